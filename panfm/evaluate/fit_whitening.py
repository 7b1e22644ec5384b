"""Fits a within-image whitening: how a model's embedding changes from a whole image to a crop of it.

    D = f(crop) - f(whole), one row per crop, in units of the embedding's standard deviation over patients
    S = D' D,  eigenvalues e, eigenvectors V      matrix = V (e / mean(e) + lambda)^(-1/2) V'

of one stream: its image is cropped, the patient's others stay whole. The matrix is symmetric, so that it survives
standardising. S and the sums behind the standard deviations add up over sites; a stream without patients takes those of
all others together.

Shape legend: P images, C channels, E numbers of an embedding.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from panfm.config.features import FeaturesConfig
from panfm.data.store import Batch, ImageStore
from panfm.errors import DataError
from panfm.models import PanModel
from panfm.models.whitening import Whitening
from panfm.seeds import derive_seed, torch_generator

Floats = NDArray[np.float64]
_SCALES = (0.5, 1.0)
"""Least and largest share of an image's area or volume in a crop."""
_BATCH = 64
_NO_VARIANCE = 1e-12


@dataclass(frozen=True)
class DifferenceSums:
    """Sums over the crops of one stream, at one site or several."""

    count: Floats
    """[], number of crops."""
    x: Floats
    """[E], sum of the embeddings of whole images."""
    xx: Floats
    """[E], sum of their squares."""
    dd: Floats
    """[E, E], sum of the products of differences."""

    def __add__(self, other: Self) -> Self:
        """Add the sums of other crops."""
        return type(self)(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


def crop_and_resize(images: Tensor, generator: torch.Generator) -> Tensor:
    """Cut a random crop of every image and bring it to the image's size, linearly interpolated.

    Args:
        images: float [P, C, height, width] or [P, C, R, A, S].
        generator: Of the size of every crop (its share of the area or volume is uniform) and of its place.
    """
    num, axes = len(images), images.dim() - 2
    low, high = _SCALES
    shares = low + (high - low) * torch.rand(num, 1, generator=generator)
    sides = shares ** (1 / axes)
    places = (1 - sides) * (2 * torch.rand(num, axes, generator=generator) - 1)
    theta = torch.cat([torch.diag_embed(sides.expand(num, axes)), places[:, :, None]], dim=2).to(images)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False, padding_mode="border")


def difference_sums(model: PanModel, store: ImageStore, crops: int, seed: int) -> dict[str, DifferenceSums]:
    """Sum over crops of the training images of one site, by stream.

    Args:
        model: Without a whitening.
        crops: Of every stream; patients are taken in turn, in random order.
        seed: Of the crops.
    """
    model.eval()
    train, sums = store.indices("train"), {}
    for stream in model.stream_names:
        holders = np.intersect1d(store.rows[stream], train) if stream in store.images else train[:0]
        if not len(holders):
            continue
        generator = torch_generator(seed, "crops", stream)
        order = torch.randperm(len(holders), generator=generator).numpy()
        taken = holders[np.resize(order, crops)]
        batches = [taken[start : start + _BATCH] for start in range(0, crops, _BATCH)]
        sums[stream] = reduce(add, (_sum_batch(model, store, at, stream, generator) for at in batches))
    return sums


def _sum_batch(
    model: PanModel, store: ImageStore, at: NDArray[np.int64], stream: str, generator: torch.Generator
) -> DifferenceSums:
    batch = store.batch(at, [name for name in model.stream_names if name in store.images])
    cropped = {**batch.images, stream: crop_and_resize(batch.images[stream], generator)}
    with torch.inference_mode():
        whole = model.embed(batch).double().cpu().numpy()
        part = model.embed(Batch(batch.size, cropped, batch.rows)).double().cpu().numpy()
    difference = part - whole
    return DifferenceSums(
        np.array(float(len(at))), whole.sum(axis=0), (whole**2).sum(axis=0), difference.T @ difference
    )


def whitening_matrix(differences: Floats, lambda_: float) -> Floats:
    """V (e / mean(e) + lambda)^(-1/2) V' of a sum of products [E, E]; without any difference, as if all were alike."""
    eigenvalues, axes = np.linalg.eigh(differences)
    eigenvalues = eigenvalues.clip(min=0.0)
    mean = eigenvalues.mean()
    relative = eigenvalues / mean if mean > 0 else np.ones_like(eigenvalues)
    matrix: Floats = (axes * (relative + lambda_) ** -0.5) @ axes.T
    return (matrix + matrix.T) / 2


def whitening_of(streams: Iterable[str], sums: Mapping[str, DifferenceSums], lambda_: float) -> Whitening:
    """Turn the sums of every stream, of all sites together, into the whitening of a model with these streams.

    Raises:
        DataError: there are no sums.
    """
    if not sums:
        raise DataError("whitening: found no training image of the model's streams, expected some")
    every = reduce(add, sums.values())
    parts = [_part(sums.get(stream, every), lambda_) for stream in streams]
    return Whitening(*(torch.from_numpy(np.stack(part)).float() for part in zip(*parts, strict=True)))


def _part(sums: DifferenceSums, lambda_: float) -> tuple[Floats, Floats, Floats]:
    centre, mean_square = sums.x / sums.count, sums.xx / sums.count
    variance = mean_square - centre**2
    scale = np.sqrt(np.where(variance > _NO_VARIANCE * mean_square, variance, 1.0))
    return centre, scale, whitening_matrix(sums.dd / np.outer(scale, scale), lambda_)


def fit_whitening(model: PanModel, stores: Mapping[str, ImageStore], features: FeaturesConfig, seed: int) -> Whitening:
    """Fit the whitening of a model from the training images of one site, or summed over several.

    Args:
        model: Without a whitening.
        stores: Site -> its images.
        features: Its lambda and number of crops.
        seed: Of the run.
    Raises:
        DataError: nobody has a training image.
    """
    total: dict[str, DifferenceSums] = {}
    for site, store in stores.items():
        own_seed = derive_seed(seed, "whitening", site)
        for stream, sums in difference_sums(model, store, features.whitening_crops, own_seed).items():
            total[stream] = total[stream] + sums if stream in total else sums
    return whitening_of(model.stream_names, total, features.whitening_lambda)
