"""Patch tokens of a stream on their grid, and where the grid lies in the scan's space.

Shape legend: P subjects that have the stream, `*grid` patches per axis, D width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from panfm.config import StreamConfig
from panfm.data.read import to_scan
from panfm.data.readers import ImageError, Volume, read_source, voxel_sizes
from panfm.data.store import ImageStore
from panfm.errors import DataError
from panfm.models import PanModel


@dataclass(frozen=True)
class TokenGrid:
    """Tokens of one stream."""

    values: NDArray[np.float32]
    """[P, *grid, D], after the last norm; a volume's axes run R, A, S, a picture's down and right."""
    subjects: NDArray[np.int64]
    """[P], the place of each in the order given."""
    affines: NDArray[np.float64] | None
    """[P, 4, 4], from a token's index on the grid to the centre of its patch in mm, in the space that the scan's own
    affine maps to (R, A, S); None for pictures, which have no place in mm."""


def stream_tokens(model: PanModel, store: ImageStore) -> dict[str, NDArray[np.float32]]:
    """Tokens [P, *grid, D] of every stream that a subject of the store has."""
    batch = store.batch(range(len(store.subjects)))
    model.eval()
    with torch.inference_mode():
        encoded = model.encode(model.patch_features(batch.to(model.stream_of_patch.device)))
    stream_of_token = model.stream_of_patch[encoded.layout.patch_index].masked_fill(~encoded.layout.valid, -1)
    tokens = {}
    for name, rows in batch.rows.items():
        of_stream = stream_of_token == model.stream_names.index(name)
        grid = model.stream_configs[name].grid
        tokens[name] = encoded.tokens[of_stream].view(len(rows), *grid, model.width).float().cpu().numpy()
    return tokens


def token_affines(paths: Iterable[Path], config: StreamConfig) -> NDArray[np.float64] | None:
    """Affines [P, 4, 4] from indices of the grid of patches to mm; None for a stream of pictures.

    Raises:
        DataError: as `read_image` does.
    """
    return np.stack([_of_file(path, config) for path in paths]) if config.is_volume else None


def _of_file(path: Path, config: StreamConfig) -> NDArray[np.float64]:
    try:
        source = read_source(path, is_volume=True)
    except ImageError as error:
        raise DataError(f"{path}: {error}") from error
    assert isinstance(source, Volume)
    return grid_affine(source.voxels.shape, source.affine, config)


def grid_affine(shape: tuple[int, ...], affine: NDArray[np.float64], config: StreamConfig) -> NDArray[np.float64]:
    """Affine [4, 4] of the grid of patches of one volume.

    Args:
        shape: Voxels of the scan as stored.
        affine: Of the scan, voxel index to mm in R, A, S.
        config: The stream's spacing, shape and patch.
    """
    axes = nib.orientations.io_orientation(affine.astype(np.float32))  # type: ignore[no-untyped-call]
    along_stored = axes[:, 0].astype(int)
    spacing, turned_shape = np.empty(3), np.empty(3, dtype=int)
    spacing[along_stored], turned_shape[along_stored] = voxel_sizes(affine), shape
    to_stored = nib.orientations.inv_ornt_aff(axes, shape)  # type: ignore[no-untyped-call]
    to_patch = np.eye(4)
    to_patch[:3, :3] = np.diag(config.patch)
    to_patch[:3, 3] = (np.asarray(config.patch) - 1) / 2
    return np.asarray(affine @ to_stored @ to_scan(tuple(turned_shape), spacing, config) @ to_patch)
