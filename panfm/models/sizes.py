"""Sizes of a model, a step and a state, counted before anything is allocated, whatever the description asks for.

Parameters are counted on torch's meta device, where tensors have shapes and no memory.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from panfm.config import RunConfig, StreamConfig, dump_toml
from panfm.errors import ConfigError, LimitError, ProtocolError
from panfm.files import KEPT_ROUNDS
from panfm.models.pan import SIZES, describe_model
from panfm.models.patch_features import num_patch_features

_TRAINED_COPIES = 8
"""Numbers per parameter that training holds: student, teacher, gradient, two moments of AdamW, the globals that the
round started from, the parameters that the model was built with, and a copy that a step or a save makes."""
_AT_WORK = 4
"""Times its own numbers that a block fills while it is computed again and gradients are taken, measured on a CPU."""
_KEPT_COPIES = 5
"""Numbers per parameter of a private state: teacher, two moments, what the coding lost, and either the student's
parameter or the global one."""
_STATE_HEADER_BYTES = 1 << 20
"""Names and shapes in a private state."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run's model at a site."""

    parameters: int
    """Of the model that `build_model` makes, with all streams of the run."""
    state_bytes: int
    """Bytes of the private state that a site keeps after a round, at most."""
    step_bytes: int
    """Bytes that one local step fills, in float32, at most, for a whole batch of patients who have every stream.

    Counted: all copies of the parameters, what the student's blocks keep of the visible tokens for the backward pass
    (`train.activations`), one block of the teacher at work on all tokens and the outputs of the others, targets,
    guesses, and running moments.
    Not counted: images and their patch features.
    """
    probe_bytes: int = 0
    """Bytes of the sums, or of the ridge paths, of all tasks of `probe.tasks` in one message, at most."""

    @property
    def kept_bytes(self) -> int:
        """Bytes of a run's private states on disk, at most: those kept, and the one that is written."""
        return (KEPT_ROUNDS + 1) * self.state_bytes


def tokens_per_patient(streams: Mapping[str, StreamConfig]) -> int:
    """Tokens of a patient who has every stream of a run."""
    return sum(math.prod(stream.grid) for stream in streams.values())


def sizes_of(run: RunConfig) -> Sizes:
    """Count the sizes of a run; equal runs are counted once, since describing a model takes as long as several steps.

    Raises:
        LimitError: the model has more bytes than a 64-bit number can say.
    """
    return _sizes_once(_Description(dump_toml(run), run))


@dataclass(frozen=True)
class _Description:
    """A run, equal to another by its text."""

    text: str
    run: RunConfig = field(compare=False)


@lru_cache(maxsize=8)
def _sizes_once(described: _Description) -> Sizes:
    run = described.run
    try:
        model = describe_model(run)
    except ConfigError as error:
        raise ProtocolError(str(error)) from error
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise LimitError.of_question("this run asks for a model of more than 2^63 bytes") from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    per_block = tuple(model.backbone.numbers_per_token())
    width, depth, _ = SIZES[run.model.size]
    features = [num_patch_features(stream, run.model.tokenizer) for stream in run.streams.values()]
    target = 8 * width + run.objective.num_target_values(features)
    tokens = tokens_per_patient(run.streams) + 1
    hidden = run.masking.ratio if run.objective.hides_tokens else 0.0
    visible = min((1.0 - hidden) * tokens + 1 + len(run.streams), tokens)
    kept = sum(per_block) if run.train.activations == "kept" else depth * width + _AT_WORK * max(per_block)
    patient = visible * kept + tokens * (max(per_block) + depth * width + target)
    batch = math.ceil(run.train.batch_size * run.objective.num_views * patient)
    moments = run.objective.num_running_values(width, tokens - 1, len(run.streams))
    size, labels = model.embedding_size, map(len, run.probe.tasks.values())
    return Sizes(
        parameters,
        state_bytes=4 * (_KEPT_COPIES * parameters + moments) + _STATE_HEADER_BYTES,
        step_bytes=4 * (batch + _TRAINED_COPIES * parameters + moments),
        probe_bytes=sum(8 * (1 + 2 * num + size * (size + num + 3)) for num in labels),
    )
