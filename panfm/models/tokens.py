"""Layouts of tokens: packing, selecting, positions.

The model's vocabulary is all patches of all its streams, in order. A batch holds, per subject, only the patches of the
streams that the subject has: absent streams are not padded in, they are not there. Rows are packed to
the left and padded to the fullest subject.

Shape legend: B subjects, N patches of the fullest subject, K patches kept, M patches in the vocabulary, D width.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from panfm.data.store import send


@dataclass(frozen=True)
class Layout:
    """The patch index of every token of a batch."""

    patch_index: Tensor
    """int64 [B, N], index into the vocabulary of M patches; 0 where padded."""
    valid: Tensor
    """bool [B, N], False where padded."""
    counts: NDArray[np.int64] | None = None
    """[B], the patches of each subject, if the CPU knows them without asking the device."""
    presence: NDArray[np.bool_] | None = None
    """[B, M], which patches each subject has; known of the layout of a batch before anything is hidden."""

    def lengths(self) -> NDArray[np.int64]:
        """Patches of each subject [B], on the CPU."""
        return self.valid.sum(dim=1).cpu().numpy() if self.counts is None else self.counts

    def to(self, device: torch.device) -> "Layout":
        """The same layout on another device."""
        return replace(self, patch_index=send(self.patch_index, device), valid=send(self.valid, device))

    @property
    def is_full(self) -> bool:
        """Whether nothing is padded."""
        return bool((self.lengths() == self.valid.shape[1]).all())

    def key_mask(self) -> Tensor | None:
        """Mark what attention may look at, CLS first: bool [B, 1, 1, 1 + N]; None if that is everything.

        A graph that is exported has no such choice, since it must hold for every batch.
        """
        if not torch.compiler.is_exporting() and self.is_full:
            return None
        return functional.pad(self.valid, (1, 0), value=True)[:, None, None, :]

    def select(
        self, keep: Tensor, counts: NDArray[np.int64] | None = None, *, width: int | None = None
    ) -> tuple["Layout", Tensor]:
        """Keep some patches, packed to the left in their old order.

        Args:
            keep: bool [B, N].
            counts: How many are kept of each subject [B], for who knows: otherwise the device is asked.
            width: K, the same or more than any subject keeps, for who does not know the counts.
        Returns:
            The smaller layout [B, K] and the int64 [B, K] column each of its patches came from (0 where padded).
        """
        keep = keep & self.valid
        kept = keep.sum(dim=1)
        if width is None:
            counts = kept.cpu().numpy() if counts is None else counts
            width = int(counts.max(initial=0))
        column = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        valid = torch.arange(width, device=keep.device) < kept[:, None]
        column = column.masked_fill(~valid, 0)
        return Layout(self.patch_index.gather(1, column).masked_fill(~valid, 0), valid, counts), column


def pack(present: Tensor, stream_of_patch: Tensor) -> Layout:
    """Layout of a batch, on the CPU.

    Args:
        present: bool [B, S], the streams each subject has; on the CPU.
        stream_of_patch: int64 [M], the stream of each patch; on the CPU.
    """
    has_patch = present[:, stream_of_patch]
    patches = torch.arange(len(stream_of_patch)).expand(len(present), -1)
    layout, _ = Layout(patches, torch.ones_like(has_patch)).select(has_patch)
    return replace(layout, presence=has_patch.numpy())


def gather_tokens(tokens: Tensor, column: Tensor) -> Tensor:
    """Tokens [B, N, D] at columns [B, K] -> [B, K, D]. Copies whole rows; `gather` goes feature by feature."""
    return tokens[torch.arange(tokens.shape[0], device=tokens.device)[:, None], column]


def rotary_angles(grid: tuple[int, ...], width: int) -> Tensor:
    """Angles [T, width] of a 2D grid's patches, row-major, for one head of attention; width is a multiple of 4.

    A patch's centre lies at y, x in [-1, 1]; each turns by 2 pi over periods from 1 to 100, in geometric steps.
    Source: DINOv3 (arXiv 2508.10104), in its released code.
    """
    places = [(torch.arange(size) + 0.5) / size * 2.0 - 1.0 for size in grid]
    centres = torch.stack(torch.meshgrid(*places, indexing="ij"), dim=-1).flatten(0, 1)
    rates = 100.0 ** -torch.arange(0, 1, 4 / width)
    return (2 * math.pi * centres[:, :, None] * rates).flatten(1).tile(2)


def sincos_positions(grid: tuple[int, ...], width: int) -> Tensor:
    """Fixed sin-cos positions of a 2D or 3D grid, float32 [T, width], row-major.

    Every axis gets an equal, even share of the width; what is left over stays zero.
    On torch's meta device they are not computed.
    Source: Vaswani et al. 2017, section 3.5, per axis as in MAE (He et al. 2022).
    """
    if torch.get_default_device().type == "meta":
        return torch.empty(math.prod(grid), width)
    share = width // (2 * len(grid)) * 2
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    rates = 10000.0 ** (-torch.arange(0, share, 2, dtype=torch.float64) / max(share, 1))
    parts = [
        waves for axis in axes for waves in ((axis.reshape(-1, 1) * rates).sin(), (axis.reshape(-1, 1) * rates).cos())
    ]
    table = torch.cat(parts, dim=1).float()
    return functional.pad(table, (0, width - table.shape[1]))
