"""Readings of volumes: what a 3D model, or a public 2D model on slices, tells of each, pooled or in place.

`in_place` keeps where a token lies: a token is described by its main directions over all tokens of the volumes that the
probe is fitted on (principal components).

Shape legend: P volumes, K slices, T tokens, D features of a token, E of a volume, Q directions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from panfm.data.store import Batch, ImageStore
from panfm.models import PanModel
from panfm.models.backbone import Encoded

NUM_SLICES, SIDE = 12, 112
"""Slices of a volume, and pixels along their edges."""
SPAN = 48
"""Voxels along A over which the slices are spread; scans of the hippocampus are 50 mm long."""
TOKEN_BLOCK = 8
"""Block of the public model whose tokens are read in place."""
DIRECTIONS = 8

_CHUNK = 16
"""Volumes of a 3D model at a time."""


@dataclass(frozen=True)
class Reading:
    """Features of some volumes."""

    pooled: NDArray[np.float32]
    """[P, E]"""
    tokens: NDArray[np.float32]
    """[P, T, D]"""

    def __getitem__(self, rows: NDArray[np.int64]) -> "Reading":
        """Select the features of some volumes by their rows."""
        return Reading(self.pooled[rows], self.tokens[rows])


@torch.inference_mode()
def read_volumes(model: PanModel, store: ImageStore, stream: str) -> Reading:
    """Embeddings by a 3D model as its run pools them, and its last block's tokens."""
    model.eval()
    pooled, tokens = [], []
    for start in range(0, len(store.subjects), _CHUNK):
        batch = store.batch(np.arange(start, min(start + _CHUNK, len(store.subjects))), [stream])
        pooled.append(model.embed(batch))
        tokens.append(_normed(model.encode(model.patch_features(batch), keep_blocks=True).blocks[-1]))
    return Reading(torch.cat(pooled).numpy(), torch.cat(tokens).numpy())


@torch.inference_mode()
def read_slices(model: PanModel, store: ImageStore, stream: str) -> Reading:
    """Embeddings by a 2D model, mean over the slices of a volume, and tokens in cells of 2 slices and 2 x 2 patches."""
    model.eval()
    [picture] = model.stream_names
    pooled, tokens = [], []
    for subject in range(len(store.subjects)):
        slices = coronal_slices(store.batch([subject], [stream]).images[stream])
        batch = Batch(NUM_SLICES, {picture: slices}, {picture: torch.arange(NUM_SLICES)})
        pooled.append(model.embed(batch).mean(dim=0))
        encoded = model.encode(model.patch_features(batch), keep_blocks=True)
        tokens.append(_cells(encoded, model.stream_configs[picture].grid))
    return Reading(torch.stack(pooled).numpy(), torch.stack(tokens).numpy())


def coronal_slices(volume: Tensor) -> Tensor:
    """Cut one volume [1, 1, R, A, S] across A into slices [K, 1, SIDE, SIDE], evenly spaced over its middle."""
    length = volume.shape[3]
    span = min(length, SPAN)
    middles = (length - span) / 2 + (torch.arange(NUM_SLICES) + 0.5) * span / NUM_SLICES
    slices = volume[0, :, :, middles.long()].movedim(2, 0)
    edge = max(slices.shape[2:])
    square = functional.pad(slices, (0, edge - slices.shape[3], 0, edge - slices.shape[2]))
    return functional.interpolate(square, (SIDE, SIDE), mode="bicubic", align_corners=False).clamp(0.0, 1.0)


def in_place(fit: Reading, test: Reading) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Tokens with their places, [P, T Q] of the volumes that a probe is fitted on and of those that it is tested on."""
    flat = fit.tokens.reshape(-1, fit.tokens.shape[-1]).astype(np.float64)
    mean = flat.mean(axis=0)
    axes = np.linalg.eigh((flat - mean).T @ (flat - mean))[1][:, ::-1][:, :DIRECTIONS]
    first, second = (((part.tokens - mean) @ axes).reshape(len(part.tokens), -1) for part in (fit, test))
    return first, second


def _cells(encoded: Encoded, grid: tuple[int, ...]) -> Tensor:
    """Tokens of all slices of a volume, averaged over pairs of slices and 2 x 2 patches: [T, D]."""
    tokens = _normed(encoded.blocks[TOKEN_BLOCK - 1]).unflatten(1, grid).movedim(-1, 0)
    return functional.avg_pool3d(tokens[None], 2)[0].flatten(1).T


def _normed(tokens: Tensor) -> Tensor:
    return functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
