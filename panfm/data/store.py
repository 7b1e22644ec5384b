"""Images of many subjects, in the form that training, probes and caches share.

Shape legend: P subjects that hold a stream, C channels, `*shape` voxels of the stream.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panfm.data.packed import PackedImages
from panfm.errors import NoSubjectsError

Images = NDArray[np.float32] | PackedImages
"""Images [P, C, *shape], whose index gives float32."""
PickSession = Callable[[int, int], int]
"""(index of a subject, number of its images of a stream) -> index of the one to show."""


def first_session(_: int, __: int) -> int:
    """Choose the first session of every subject."""
    return 0


@dataclass(frozen=True)
class Batch:
    """Images of some subjects, by stream. A stream's tensor has rows for the subjects that hold it, and no others."""

    size: int
    """Number of subjects."""
    images: dict[str, Tensor]
    """Stream -> float32 [P, C, *shape]; only streams that at least one subject holds."""
    rows: dict[str, Tensor]
    """Stream -> int64 [P], which subject of the batch each image belongs to, ascending; always on the CPU, because
    shapes follow from it."""
    labels: Tensor | None = None
    """float32 [size, K], the labels of a run's `[task]`; NaN where unknown."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        images = {stream: send(image, device) for stream, image in self.images.items()}
        return replace(self, images=images, labels=None if self.labels is None else send(self.labels, device))

    def pinned(self) -> "Batch":
        """Copy what is on the CPU into pinned memory, from which a copy to a GPU does not wait."""
        pinned = {stream: image.pin_memory() if image.is_cpu else image for stream, image in self.images.items()}
        return replace(self, images=pinned)

    def only(self, streams: Collection[str]) -> "Batch":
        """The same subjects with the images of some streams."""
        images = {stream: image for stream, image in self.images.items() if stream in streams}
        return replace(self, images=images, rows={stream: self.rows[stream] for stream in images})


@dataclass(frozen=True, eq=False)
class ImageStore:
    """Images of all subjects of one site or folder, in memory or memory-mapped.

    A subject that came for several sessions has several images of a stream; a batch shows one of them.

    Guarantees:
        order: subjects keep the order of the manifest; rows of a stream ascend, sessions of a subject by name.
    """

    read_ahead: ClassVar[bool] = True
    """Whether threads should prepare batches ahead of their steps. Where a batch takes less time than a thread takes
    from the steps, they should not."""

    subjects: tuple[str, ...]
    splits: tuple[str, ...]
    """Per subject: train, val or test."""
    images: Mapping[str, Images]
    """Stream -> float32 [P, C, *shape], or what gives them."""
    rows: Mapping[str, NDArray[np.int64]]
    """Stream -> int64 [P], index into `subjects`."""
    sessions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Stream -> [P], session of each image; of streams with sessions only."""
    digests: Mapping[str, Sequence[bytes]] = field(default_factory=dict)
    """Stream -> hash of the content of each image; none where images were made in memory."""
    labels: NDArray[np.float32] | None = None
    """[subjects, K], the labels of a run's `[task]` in the units of its loss; NaN where unknown."""

    def batch(
        self,
        indices: Sequence[int] | NDArray[np.int64],
        streams: Iterable[str] | None = None,
        pick: PickSession = first_session,
    ) -> Batch:
        """Images of the subjects at `indices` (into `subjects`), of all streams or only those named.

        A subject may come out without any stream; the model then sees its CLS token alone.

        Args:
            pick: Chooses among the sessions of a subject; the first when left out.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        images: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        for stream in self.images if streams is None else streams:
            where = self._position(stream, wanted, pick)
            holders = np.flatnonzero(where >= 0)
            if len(holders):
                images[stream] = self.images_at(stream, where[holders])
                rows[stream] = torch.from_numpy(holders)
        labels = None if self.labels is None else torch.from_numpy(self.labels[wanted])
        return Batch(len(wanted), images, rows, labels)

    def images_at(self, stream: str, positions: NDArray[np.int64]) -> Tensor:
        """Images of a stream by their positions, [n, C, *shape], in memory of their own."""
        return torch.from_numpy(np.ascontiguousarray(self.images[stream][positions]))

    def indices(self, split: str) -> NDArray[np.int64]:
        """Subjects of one split, as indices into `subjects`."""
        return np.flatnonzero(np.asarray(self.splits, dtype=object) == split)

    def members(self, split: str, place: str, streams: Iterable[str] | None = None) -> NDArray[np.int64]:
        """Subjects of one split that hold an image, as indices into `subjects`.

        Args:
            place: Site or folder, for the error.
            streams: Those of which they hold at least one; any when None.
        Raises:
            NoSubjectsError: there are none.
        """
        names = list(self.images) if streams is None else list(streams)
        if not len(indices := self.holders(self.indices(split), names)):
            raise NoSubjectsError.of(place, split, names)
        return indices

    def holders(self, indices: NDArray[np.int64], streams: Iterable[str]) -> NDArray[np.int64]:
        """Filter subjects, given as indices: keep those that hold at least one of the streams, in the order given."""
        rows = [self.rows[stream] for stream in streams if stream in self.rows]
        return indices[np.isin(indices, np.concatenate(rows))] if rows else indices[:0]

    def num_holding(self, stream: str, split: str) -> int:
        """Subjects of a split that hold a stream."""
        return len(self.holders(self.indices(split), [stream]))

    def _position(self, stream: str, wanted: NDArray[np.int64], pick: PickSession) -> NDArray[np.int64]:
        """Image of each wanted subject, as index into the stream's images; -1 where there is none."""
        first, end = (np.searchsorted(self.rows[stream], wanted, side) for side in ("left", "right"))
        for at in np.flatnonzero(end > first + 1):
            first[at] += pick(int(wanted[at]), int(end[at] - first[at]))
        return np.where(end > first, first, -1)


def send(value: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device; a copy from the CPU to a GPU does not wait for what the GPU has to do before."""
    is_upload = value.device.type == "cpu" and torch.device(device).type == "cuda"
    return value.pin_memory().to(device, non_blocking=True) if is_upload else value.to(device)


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Join batches into one: the subjects of the first, then those of the second, and so on."""
    if len(batches) == 1:
        return batches[0]
    offsets = np.cumsum([0, *(batch.size for batch in batches)]).tolist()
    images: dict[str, list[Tensor]] = {}
    rows: dict[str, list[Tensor]] = {}
    for batch, offset in zip(batches, offsets, strict=False):
        for stream, image in batch.images.items():
            images.setdefault(stream, []).append(image)
            rows.setdefault(stream, []).append(batch.rows[stream] + offset)
    joined = {stream: torch.cat(parts) for stream, parts in images.items()}
    labels = [batch.labels for batch in batches if batch.labels is not None]
    assert len(labels) in (0, len(batches)), "batches with labels and batches without cannot be joined"
    joined_rows = {stream: torch.cat(parts) for stream, parts in rows.items()}
    return Batch(offsets[-1], joined, joined_rows, torch.cat(labels) if labels else None)
