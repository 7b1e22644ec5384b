"""The input of a tokenizer: raw voxels, or statistics of small blocks.

Patch features have no parameters, so they are computed once per image and kept. `statistics` turns every half-patch
block into its mean, log standard deviation and mean absolute gradient; small cohorts learn several times faster from it
than from raw voxels. `texture` reads, besides mean and log standard deviation, how fast intensity changes in four
directions of the plane, so that it tells a texture that runs one way from one that runs another way. `patch` leaves
the image as it is, as in ViT.

Shape legend: P images, C channels, `*shape` voxels, `*coarse` blocks, T tokens, F features per token.
"""

from dataclasses import replace

import torch
from torch import Tensor

from panfm.config import StreamConfig
from panfm.config.model import TOKENIZER_INPUTS
from panfm.data.store import Batch, send
from panfm.errors import ConfigError

_SD_FLOOR = 0.01
"""Added to the standard deviation before the logarithm; intensities lie in [0, 1]."""
_DIFFERENCE_FLOOR = 0.001
"""Added to the mean absolute difference before the logarithm."""
DIRECTIONS = ((1, 0), (0, 1), (1, 1), (1, -1))
"""Steps along the first two axes of an image, over which `texture` takes differences: for a volume along R, A, R + A
and R - A."""
_CENTRES = {"statistics": (0.2, -3.0, 0.03), "texture": (0.3, -3.0, -3.5, -3.5, -3.5, -3.5)}
"""Typical mean, log standard deviation and gradient, or four log mean absolute differences, of a block."""
_SCALES = {"statistics": (32.0, 4.0, 160.0), "texture": (16.0, 4.0, 8.0, 8.0, 8.0, 8.0)}
"""Factors of these. Large, so that the few hundredths by which patients differ are not lost beside a token's constant
parts: a model takes hundreds of steps to grow a scale that it lacks (simulations/studies/LOG.md)."""


def has_block_features(tokenizer: str) -> bool:
    """Whether a tokenizer reads statistics of blocks, not the voxels themselves."""
    return tokenizer != "patch"


def image_features(images: Tensor, stream: StreamConfig, tokenizer: str) -> Tensor:
    """Compute the features [P, C', *coarse] of images [P, C, *shape]; `tokenizer` is `statistics`, `texture` or
    `patch`."""
    if stream.lacks_constants:
        raise ConfigError('input-constants: "summed" is computed before round 1 of a run, expected its run.toml')
    if stream.input_centre is None or stream.input_scale is None:
        return _MEASURES[tokenizer](images, _block(stream)) if has_block_features(tokenizer) else images
    inputs = tokenizer_inputs(images, stream, tokenizer)
    per_channel = (-1, *(1,) * len(stream.shape))
    centre, scale = (
        send(inputs.new_tensor(numbers, device="cpu"), inputs.device).view(per_channel)
        for numbers in (stream.input_centre, stream.input_scale)
    )
    return (inputs - centre) * scale


def tokenizer_inputs(images: Tensor, stream: StreamConfig, tokenizer: str) -> Tensor:
    """Compute the numbers [P, C', *coarse] of images [P, C, *shape] that are centred and scaled: block statistics, or
    the voxels themselves."""
    return torch.cat(_RAW[tokenizer](images, _block(stream)), dim=1) if has_block_features(tokenizer) else images


def typical_constants(tokenizer: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return centre and scale of each kind of input where a stream has no constants of its own."""
    return _CENTRES.get(tokenizer, (0.0,)), _SCALES.get(tokenizer, (1.0,))


def patch_step(stream: StreamConfig, tokenizer: str) -> tuple[int, ...]:
    """Size of one token on the patch features, per axis."""
    if tokenizer == "patch":
        return stream.patch
    return tuple(size // block for size, block in zip(stream.patch, _block(stream), strict=True))


def num_patch_features(stream: StreamConfig, tokenizer: str) -> int:
    """F: numbers per token that the tokenizer's linear layer reads."""
    features = stream.channels * TOKENIZER_INPUTS[tokenizer]
    for step in patch_step(stream, tokenizer):
        features *= step
    return features


def batch_features(batch: Batch, streams: dict[str, StreamConfig], tokenizer: str) -> Batch:
    """Replace every image of a batch by its patch features."""
    features = {name: image_features(images, streams[name], tokenizer) for name, images in batch.images.items()}
    return replace(batch, images=features)


def block_statistics(images: Tensor, block: tuple[int, ...]) -> Tensor:
    """Mean, log standard deviation and mean absolute gradient of every block.

    Args:
        images: float32 [P, C, *shape], intensities in [0, 1].
        block: Voxels per block and axis; divides `shape`.
    Returns:
        float32 [P, 3 C, *coarse], each statistic centred and scaled, the same for all streams.
    """
    return _centred_and_scaled(_raw_statistics(images, block), "statistics")


def block_texture(images: Tensor, block: tuple[int, ...]) -> Tensor:
    """Mean, log standard deviation, and log mean absolute differences in four directions, of every block.

    A difference in direction d is |I(x + d) - I(x)| at x; it is 0 where x + d lies outside of the image.

    Args:
        images: float32 [P, C, *shape], intensities in [0, 1].
        block: Voxels per block and axis; divides `shape`.
    Returns:
        float32 [P, 6 C, *coarse], each statistic centred and scaled, the same for all streams.
    """
    return _centred_and_scaled(_raw_texture(images, block), "texture")


def patchify(features: Tensor, step: tuple[int, ...]) -> Tensor:
    """Cut features [P, C, *coarse] into tokens [P, T, F], patches in row-major order, channels first within a patch."""
    images, channels, *sizes = features.shape
    split: list[int] = [images, channels]
    for size, width in zip(sizes, step, strict=True):
        split += [size // width, width]
    axes = len(step)
    grid, inside = [2 + 2 * axis for axis in range(axes)], [3 + 2 * axis for axis in range(axes)]
    ordered = features.reshape(split).permute(0, *grid, 1, *inside)
    return ordered.reshape(images, -1, channels * torch.Size(step).numel())


def intensities(patches: Tensor, stream: StreamConfig, tokenizer: str) -> Tensor:
    """Convert patches [..., F] back to the image's own units: voxels, or the means of blocks [..., F / 3] of
    `statistics`, [..., F / 6] of `texture`."""
    means = patches[..., : patches.shape[-1] // TOKENIZER_INPUTS[tokenizer]]
    if stream.input_centre is None or stream.input_scale is None:
        return means / _SCALES[tokenizer][0] + _CENTRES[tokenizer][0] if has_block_features(tokenizer) else means
    per_channel = means.unflatten(-1, (stream.channels, -1))
    constants = (numbers[: stream.channels] for numbers in (stream.input_centre, stream.input_scale))
    centre, scale = (means.new_tensor(numbers)[:, None] for numbers in constants)
    return (per_channel / scale + centre).flatten(-2)


def _block(stream: StreamConfig) -> tuple[int, ...]:
    return tuple(size // 2 if size % 2 == 0 else size for size in stream.patch)


def _block_mean(images: Tensor, block: tuple[int, ...]) -> Tensor:
    split: list[int] = list(images.shape[:2])
    for size, width in zip(images.shape[2:], block, strict=True):
        split += [size // width, width]
    return images.reshape(split).mean(dim=[3 + 2 * axis for axis in range(len(block))])


def _centred_and_scaled(statistics: tuple[Tensor, ...], tokenizer: str) -> Tensor:
    triples = zip(statistics, _CENTRES[tokenizer], _SCALES[tokenizer], strict=True)
    return torch.cat([(value - centre) * scale for value, centre, scale in triples], dim=1)


def _mean_and_log_sd(images: Tensor, block: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    mean = _block_mean(images, block)
    variance = (_block_mean(images.square(), block) - mean.square()).clamp_min(0.0)
    return mean, (variance.sqrt() + _SD_FLOOR).log()


def _raw_statistics(images: Tensor, block: tuple[int, ...]) -> tuple[Tensor, ...]:
    return *_mean_and_log_sd(images, block), _block_mean(_absolute_gradient(images), block)


def _raw_texture(images: Tensor, block: tuple[int, ...]) -> tuple[Tensor, ...]:
    differences = (_block_mean(_absolute_difference(images, step), block) for step in DIRECTIONS)
    return *_mean_and_log_sd(images, block), *((difference + _DIFFERENCE_FLOOR).log() for difference in differences)


def _absolute_difference(images: Tensor, step: tuple[int, int]) -> Tensor:
    """|I(x + step) - I(x)| at x [P, C, *shape], over the first two axes; 0 where x + step lies outside."""
    rows, columns = images.shape[2:4]
    first, second = step
    here = (slice(None), slice(None), slice(0, rows - first), slice(max(0, -second), columns - max(0, second)))
    there = (slice(None), slice(None), slice(first, rows), slice(max(0, second), columns - max(0, -second)))
    total = torch.zeros_like(images)
    total[here] = (images[there] - images[here]).abs()
    return total


def _absolute_gradient(images: Tensor) -> Tensor:
    total = torch.zeros_like(images)
    axes = range(2, images.dim())
    for axis in axes:
        steps = images.diff(dim=axis).abs()
        total.narrow(axis, 0, steps.shape[axis]).add_(steps)
    return total / len(axes)


_MEASURES = {"statistics": block_statistics, "texture": block_texture}
_RAW = {"statistics": _raw_statistics, "texture": _raw_texture}
