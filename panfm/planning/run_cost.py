"""Formulas of what a run costs: bytes, seconds and memory of a round, from counted sizes and measured seconds.

`panfm plan` and `python -m simulations bench scale` use the same ones; docs/scaling.md shows what they give.
"""

import math
from collections.abc import Collection, Mapping

from panfm.config import RunConfig, StreamConfig
from panfm.models.patch_features import num_patch_features
from panfm.sharing.groups import has_group, stream_group

_NUMBER_BYTES = 4
_SERVER_COPIES = 3.25
"""Copies of the trained parameters that a server holds while it averages, however many sites there are: the global
model, the sum, one reply, and a byte per number for the signs (`peak_copies` of `bench aggregate`, and the first)."""


def bytes_up(group_sizes: Mapping[str, int], holders: Mapping[str, Collection[str]]) -> dict[str, int]:
    """Site -> bytes that it sends in a round, uncoded: the groups that its streams train.

    Args:
        group_sizes: Group -> its numbers.
        holders: Site -> the streams that it holds.
    """
    return {
        site: _NUMBER_BYTES
        * sum(size for group, size in group_sizes.items() if has_group(set(map(stream_group, streams)), group))
        for site, streams in holders.items()
    }


def round_seconds(step_seconds: float, local_steps: int, *, sites_in_turn: int = 1) -> float:
    """Seconds that the training of a round takes: sites on machines of their own train side by side, those of one
    machine in turn."""
    return step_seconds * local_steps * sites_in_turn


def link_seconds(num_bytes: float, megabits_per_second: float) -> float:
    """Seconds that bytes take over a link."""
    return 8.0 * num_bytes / (1e6 * megabits_per_second)


def steps_of(patients: int, batch_size: int) -> int:
    """Steps in which every patient is drawn once."""
    return math.ceil(patients / batch_size)


def server_memory_bytes(trained: int) -> float:
    """Bytes that the server fills while it averages, beside libraries.

    Args:
        trained: Parameters that travel.
    """
    return _SERVER_COPIES * _NUMBER_BYTES * trained


def image_bytes(streams: Mapping[str, StreamConfig], subjects: int, *, per_voxel: int = _NUMBER_BYTES) -> int:
    """Bytes of a site's preprocessed images, for subjects who have every stream."""
    return per_voxel * subjects * sum(stream.channels * math.prod(stream.shape) for stream in streams.values())


def feature_bytes(run: RunConfig, subjects: int) -> int:
    """Bytes of the patch features of subjects who have every stream."""
    streams = run.streams.values()
    return (
        _NUMBER_BYTES
        * subjects
        * sum(math.prod(stream.grid) * num_patch_features(stream, run.model.tokenizer) for stream in streams)
    )
