"""The input of a tokenizer: raw voxels, or statistics of small blocks.

Patch features have no parameters, so they are computed once per image and kept. `statistics` turns every half-patch
block into its mean, log standard deviation and mean absolute gradient; small cohorts learn several times faster from it
than from raw voxels. `texture` reads, besides mean and log standard deviation, how fast intensity changes in four
directions of the plane, so that it tells a texture that runs one way from one that runs another way. `patch` leaves
the image as it is, as in ViT.

Shape legend: P images, C channels, `*shape` voxels, `*coarse` blocks, T tokens, F features per token.
"""

import torch
from torch import Tensor

from panfm.config import StreamConfig
from panfm.data.store import Batch

_SD_FLOOR = 0.01
"""Added to the standard deviation before the logarithm; intensities lie in [0, 1]."""
_CENTRES = (0.2, -3.0, 0.03)
"""Typical mean, log standard deviation and gradient of a block."""
_DIFFERENCE_FLOOR = 0.001
"""Added to the mean absolute difference before the logarithm."""
_TEXTURE_CENTRES = (0.3, -3.0, -3.5, -3.5, -3.5, -3.5)
"""Typical mean, log standard deviation and four log mean absolute differences of a block."""
_TEXTURE_SCALES = (16.0, 4.0, 8.0, 8.0, 8.0, 8.0)
"""Factors of these."""
DIRECTIONS = ((1, 0), (0, 1), (1, 1), (1, -1))
"""Steps along the first two axes of an image, over which `texture` takes differences: for a volume along R, A, R + A
and R - A."""
_NUM_STATISTICS = {"statistics": 3, "texture": 2 + len(DIRECTIONS), "patch": 1}
"""Tokenizer -> numbers per channel and block, or voxel."""
_SCALES = (32.0, 4.0, 160.0)
"""Factors of mean, log standard deviation and gradient. Large, so that the few hundredths by which patients differ are
not lost beside a token's constant parts: a model takes hundreds of steps to grow a scale that it lacks
(simulations/studies/LOG.md)."""


def has_block_features(tokenizer: str) -> bool:
    """Whether a tokenizer reads statistics of blocks, not the voxels themselves."""
    return tokenizer != "patch"


def image_features(images: Tensor, stream: StreamConfig, tokenizer: str) -> Tensor:
    """Compute the features [P, C', *coarse] of images [P, C, *shape]; `tokenizer` is `statistics`, `texture` or
    `patch`."""
    if tokenizer == "patch":
        return images
    return (block_texture if tokenizer == "texture" else block_statistics)(images, _block(stream))


def patch_step(stream: StreamConfig, tokenizer: str) -> tuple[int, ...]:
    """Size of one token on the patch features, per axis."""
    if tokenizer == "patch":
        return stream.patch
    return tuple(size // block for size, block in zip(stream.patch, _block(stream), strict=True))


def num_patch_features(stream: StreamConfig, tokenizer: str) -> int:
    """F: numbers per token that the tokenizer's linear layer reads."""
    features = stream.channels * _NUM_STATISTICS[tokenizer]
    for step in patch_step(stream, tokenizer):
        features *= step
    return features


def batch_features(batch: Batch, streams: dict[str, StreamConfig], tokenizer: str) -> Batch:
    """Replace every image of a batch by its patch features."""
    features = {name: image_features(images, streams[name], tokenizer) for name, images in batch.images.items()}
    return Batch(batch.size, features, batch.rows)


def block_statistics(images: Tensor, block: tuple[int, ...]) -> Tensor:
    """Mean, log standard deviation and mean absolute gradient of every block.

    Args:
        images: float32 [P, C, *shape], intensities in [0, 1].
        block: Voxels per block and axis; divides `shape`.
    Returns:
        float32 [P, 3 C, *coarse], each statistic centred and scaled, the same for all streams.
    """
    mean, log_sd = _mean_and_log_sd(images, block)
    gradient = _block_mean(_absolute_gradient(images), block)
    statistics = zip((mean, log_sd, gradient), _CENTRES, _SCALES, strict=True)
    return torch.cat([(value - centre) * scale for value, centre, scale in statistics], dim=1)


def block_texture(images: Tensor, block: tuple[int, ...]) -> Tensor:
    """Mean, log standard deviation, and log mean absolute differences in four directions, of every block.

    A difference in direction d is |I(x + d) - I(x)| at x; it is 0 where x + d lies outside of the image.

    Args:
        images: float32 [P, C, *shape], intensities in [0, 1].
        block: Voxels per block and axis; divides `shape`.
    Returns:
        float32 [P, 6 C, *coarse], each statistic centred and scaled, the same for all streams.
    """
    statistics = zip(_raw_texture(images, block), _TEXTURE_CENTRES, _TEXTURE_SCALES, strict=True)
    return torch.cat([(value - centre) * scale for value, centre, scale in statistics], dim=1)


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


def intensities(patches: Tensor, tokenizer: str) -> Tensor:
    """Convert patches [..., F] back to the image's own units: voxels, or the means of blocks [..., F / 3] of
    `statistics`, [..., F / 6] of `texture`."""
    if tokenizer == "patch":
        return patches
    means = patches[..., : patches.shape[-1] // _NUM_STATISTICS[tokenizer]]
    if tokenizer == "texture":
        return means / _TEXTURE_SCALES[0] + _TEXTURE_CENTRES[0]
    return means / _SCALES[0] + _CENTRES[0]


def _block(stream: StreamConfig) -> tuple[int, ...]:
    return tuple(size // 2 if size % 2 == 0 else size for size in stream.patch)


def _block_mean(images: Tensor, block: tuple[int, ...]) -> Tensor:
    split: list[int] = list(images.shape[:2])
    for size, width in zip(images.shape[2:], block, strict=True):
        split += [size // width, width]
    return images.reshape(split).mean(dim=[3 + 2 * axis for axis in range(len(block))])


def _mean_and_log_sd(images: Tensor, block: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    mean = _block_mean(images, block)
    variance = (_block_mean(images.square(), block) - mean.square()).clamp_min(0.0)
    return mean, (variance.sqrt() + _SD_FLOOR).log()


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
