"""Augmentation: varies the images of a batch, with parameters drawn for each subject from a generator of its own.

    moved     crop, rotation and flips in one affine map, one linear interpolation, edges reflected
    blurred   (1 - b) image + b Gaussian(image)
    field     times exp(sum of c_k p_k), p_k the monomials of degree 1 and 2 of the position in [-1, 1]
    gamma     to the power exp(g)
    contrast  mean + (1 + c) (image - mean)
    bright    times 1 + e
    noise     plus s times standard normal noise
    cut to [0, 1]

All parameters are uniform between minus and plus the strength (`b` and `s`: between 0 and it).

Shape legend: B subjects, P subjects that hold a stream, S streams, C channels, `*shape` voxels, A axes.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from panfm.config import StreamConfig
from panfm.config.augment import AugmentConfig, Strengths, axis_names
from panfm.data.resample import gaussian_kernel
from panfm.data.store import Batch, send
from panfm.data.warp import blur

_DRAWS = {"area": 1, "offset": 3, "angle": 3, "flip": 3, "blur": 1, "field": 9, "gamma": 1, "contrast": 1} | {
    "brightness": 1,
    "noise": 1,
}
"""Uniform numbers that are drawn for each image, whichever of them its stream uses."""


class Augmentation:
    """Varies the images of a run's streams.

    Guarantees:
        per subject: what is drawn for a subject depends on its generator and the streams that it holds alone.
    """

    def __init__(self, config: AugmentConfig, streams: Mapping[str, StreamConfig]) -> None:
        self._streams = {name: (stream, config.of_stream(name)) for name, stream in streams.items()}

    @torch.no_grad()
    def vary(self, batch: Batch, generators: Sequence[torch.Generator]) -> Batch:
        """Draw one view of a batch of images.

        Args:
            generators: One for each of its subjects, on the CPU.
        Raises:
            ValueError: images of another shape than their stream's, such as patch features.
        """
        drawn = self._draw(generators)
        images = {}
        for index, (name, (stream, strengths)) in enumerate(self._streams.items()):
            if name in batch.images:
                own, rows = batch.images[name], batch.rows[name]
                if own.shape[2:] != stream.shape:
                    raise ValueError(f"stream {name}: found {tuple(own.shape[2:])}, expected images of {stream.shape}")
                draws = _named(send(drawn[rows, index], own.device))
                varied = _varied_intensities(_moved(own, stream, strengths, draws), strengths, draws)
                images[name] = _noisy(varied, strengths, draws, [generators[row] for row in rows.tolist()])
        return replace(batch, images=images)

    @torch.no_grad()
    def move(self, name: str, maps: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Crop, rotate and flip maps [B, K, *shape] in the way in which `vary` does with the images of a stream.

        Args:
            generators: One for each subject, in the state in which `vary` was given them.
        """
        drawn = self._draw(generators)[:, list(self._streams).index(name)]
        return _moved(maps, *self._streams[name], _named(drawn.to(maps.device)))

    def _draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw uniform random numbers [B, S, n]: subjects, streams, numbers per image."""
        return torch.stack([torch.rand(len(self._streams), sum(_DRAWS.values()), generator=one) for one in generators])


def _named(drawn: Tensor) -> dict[str, Tensor]:
    """Uniform numbers in [0, 1) by what they are for, from all numbers [P, n] of one stream."""
    return dict(zip(_DRAWS, drawn.split(list(_DRAWS.values()), dim=1), strict=True))


def _moved(images: Tensor, stream: StreamConfig, strengths: Strengths, draws: Mapping[str, Tensor]) -> Tensor:
    """Crop, rotate and flip images [P, C, *shape]."""
    if not strengths.moves:
        return images
    matrix, offset = _affine(stream, strengths, draws)
    theta = torch.cat([matrix.flip(1, 2), offset.flip(1)[..., None]], dim=2)  # torch names the last axis first
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _affine(stream: StreamConfig, strengths: Strengths, draws: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Map from a view's positions to the image's, both in [-1, 1] on every axis: matrices [P, A, A], offsets [P, A]."""
    axes = len(stream.shape)
    least, greatest = strengths.crop
    edge = (least + (greatest - least) * draws["area"]) ** (1.0 / axes)
    flips = send(torch.tensor([name in strengths.flips for name in axis_names(stream)]), edge.device)
    sign = torch.where(flips & (draws["flip"][:, :axes] < 0.5), -1.0, 1.0)
    extent = send(torch.tensor(stream.shape) * torch.tensor(stream.spacing_mm or (1.0,) * axes), edge.device)
    turned = _rotation(strengths.rotation * _signed(draws["angle"]), axes)
    matrix = turned * extent / extent[:, None] * (edge * sign)[:, None, :]
    return matrix, (1.0 - edge) * _signed(draws["offset"][:, :axes])


def _rotation(angles: Tensor, axes: int) -> Tensor:
    """Rotations [P, A, A] by angles [P, 3], one in each plane of two axes."""
    turned = torch.eye(axes, device=angles.device).expand(len(angles), -1, -1)
    for plane, (first, second) in enumerate(itertools.combinations(range(axes), 2)):
        cosine, sine = angles[:, plane].cos(), angles[:, plane].sin()
        turn = torch.eye(axes, device=angles.device).repeat(len(angles), 1, 1)
        turn[:, first, first], turn[:, second, second] = cosine, cosine
        turn[:, first, second], turn[:, second, first] = -sine, sine
        turned = turned @ turn
    return turned


def _blurred(images: Tensor) -> Tensor:
    """Blur images [P, C, *shape] by a Gaussian of standard deviation 1 voxel, cut off at 2."""
    kernel = gaussian_kernel(1.0, cut_off=2.0)
    return blur(images, [kernel / kernel.sum()] * len(images.shape[2:]), "reflect")


def _varied_intensities(images: Tensor, strengths: Strengths, draws: Mapping[str, Tensor]) -> Tensor:
    """Blur, bias field, gamma, contrast and brightness of images [P, C, *shape]."""

    def number(key: str, strength: float) -> Tensor:
        return (strength * _signed(draws[key])).reshape(-1, *(1,) * (images.dim() - 1))

    if strengths.blur:
        share = strengths.blur * draws["blur"].reshape(-1, *(1,) * (images.dim() - 1))
        images = images.lerp(_blurred(images), share)
    if strengths.bias_field:
        images = images * _field(strengths.bias_field * _signed(draws["field"]), images.shape[2:])
    if strengths.gamma:
        images = images.clamp(0.0, 1.0) ** number("gamma", strengths.gamma).exp()
    if strengths.contrast:
        mean = images.mean(dim=list(range(1, images.dim())), keepdim=True)
        images = mean + (1.0 + number("contrast", strengths.contrast)) * (images - mean)
    if strengths.brightness:
        images = images * (1.0 + number("brightness", strengths.brightness))
    return images


def _field(coefficients: Tensor, shape: Sequence[int]) -> Tensor:
    """Smooth positive fields [P, 1, *shape] by coefficients [P, 9] of their logarithm."""
    axes = torch.meshgrid(
        *(torch.linspace(-1.0, 1.0, size, device=coefficients.device) for size in shape), indexing="ij"
    )
    pairs = itertools.combinations_with_replacement(axes, 2)
    monomials = torch.stack([*axes, *(first * second for first, second in pairs)])
    logarithm = torch.tensordot(coefficients[:, : len(monomials)], monomials, dims=1)
    return logarithm.exp()[:, None]


def _noisy(
    images: Tensor, strengths: Strengths, draws: Mapping[str, Tensor], generators: Sequence[torch.Generator]
) -> Tensor:
    """Add noise to images [P, C, *shape], and cut them to [0, 1]."""
    if strengths.noise:
        noise = torch.stack([torch.randn(images.shape[1:], generator=one) for one in generators])
        deviation = strengths.noise * draws["noise"]
        images = images + deviation.reshape(-1, *(1,) * (images.dim() - 1)) * send(noise, images.device)
    return images.clamp(0.0, 1.0)


def _signed(uniform: Tensor) -> Tensor:
    """Numbers in [-1, 1) from numbers in [0, 1)."""
    return 2.0 * uniform - 1.0
