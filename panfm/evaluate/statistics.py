"""References that a learned embedding is compared to: measurements of every stream, read by the same linear probe.

`statistics`, per volume: mean, standard deviation, seven percentiles, mean absolute gradient; per token block: mean,
log standard deviation, mean absolute gradient. `tokenizer`: the patch features that the model itself reads, of every
block. Streams that a subject lacks are filled with the fit subjects' means.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from panfm.config import StreamConfig
from panfm.data.store import ImageStore
from panfm.models.patch_features import block_statistics, image_features

_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_CHUNK = 128


@dataclass(frozen=True)
class StreamStatistics:
    """One stream's statistics at one place."""

    rows: NDArray[np.int64]
    """[P] subjects that hold the stream, index into the store's subjects."""
    values: NDArray[np.float32]
    """[P, F]"""


def measure_store(
    store: ImageStore, streams: Mapping[str, StreamConfig], *, tokenizer: str | None = None
) -> dict[str, StreamStatistics]:
    """Statistics of all images of a store.

    Args:
        tokenizer: Instead of plain statistics, the patch features of this tokenizer, block by block.
    """
    measure = _measure if tokenizer is None else partial(_patch_features, tokenizer=tokenizer)
    measured = {}
    for stream, images in store.images.items():
        starts = range(0, len(images), _CHUNK)
        chunks = [measure(np.asarray(images[start : start + _CHUNK]), streams[stream]) for start in starts]
        if chunks:
            measured[stream] = StreamStatistics(np.asarray(store.rows[stream]), np.concatenate(chunks))
    return measured


@dataclass(frozen=True)
class StatisticsReference:
    """Turns measured statistics into one feature row per subject."""

    means: Mapping[str, NDArray[np.float32]]
    """Stream -> [F], the fit subjects' means."""

    @classmethod
    def fit(cls, places: Iterable[tuple[Mapping[str, StreamStatistics], NDArray[np.int64]]]) -> "StatisticsReference":
        """Take the means over the fit subjects: for each place its statistics and their indices."""
        by_stream: dict[str, list[NDArray[np.float32]]] = {}
        for measured, indices in places:
            for stream, statistics in measured.items():
                by_stream.setdefault(stream, []).append(statistics.values[np.isin(statistics.rows, indices)])
        pooled = {stream: np.concatenate(values) for stream, values in sorted(by_stream.items())}
        return cls({stream: values.mean(axis=0) for stream, values in pooled.items() if len(values)})

    def features(
        self,
        measured: Mapping[str, StreamStatistics],
        indices: NDArray[np.int64],
        streams: Sequence[str] | None = None,
    ) -> NDArray[np.float32]:
        """Features [n, sum of F]; of all streams, or with those not named treated as absent."""
        blocks = [np.empty((len(indices), 0), dtype=np.float32)]
        for stream, mean in self.means.items():
            block = np.repeat(mean[None], len(indices), axis=0)
            if stream in measured and (streams is None or stream in streams):
                position = {int(row): at for at, row in enumerate(measured[stream].rows)}
                pairs = [(row, position[int(index)]) for row, index in enumerate(indices) if int(index) in position]
                if pairs:
                    into, source = np.array(pairs).T
                    block[into] = measured[stream].values[source]
            blocks.append(block)
        return np.concatenate(blocks, axis=1)


def _measure(images: NDArray[np.float32], stream: StreamConfig) -> NDArray[np.float32]:
    """Statistics [P, F] of images [P, C, *shape]."""
    tensor = torch.from_numpy(np.array(images))
    blocks = block_statistics(tensor, stream.patch).flatten(1)
    whole = block_statistics(tensor, stream.shape).flatten(1)
    voxels = np.sort(images.reshape(*images.shape[:2], -1), axis=-1)
    ranks = np.round(np.array(_PERCENTILES) / 100 * (voxels.shape[-1] - 1)).astype(np.int64)
    percentiles = voxels[..., ranks].reshape(len(images), -1)
    return np.concatenate([whole.numpy(), percentiles, blocks.numpy()], axis=1).astype(np.float32)


def _patch_features(images: NDArray[np.float32], stream: StreamConfig, tokenizer: str) -> NDArray[np.float32]:
    """Patch features [P, F] of images [P, C, *shape], one number per block and statistic."""
    return image_features(torch.from_numpy(np.array(images)), stream, tokenizer).flatten(1).numpy()
