"""Compares an export with the model it was made from: random images go through both.

Shape legend: B subjects, S streams, D width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from panfm.config import StreamConfig
from panfm.data.store import Batch
from panfm.errors import RunError
from panfm.seeds import torch_generator

TOLERANCE = 1e-5
"""Largest difference between an export's embedding and the model's own, whose numbers are of order 1."""


def random_inputs(streams: Mapping[str, StreamConfig]) -> tuple[Tensor, ...]:
    """Images [B, C, *shape] of every stream, then `present`, bool [B, S]: subjects with all streams, every other one,
    the rest, the first alone, and none. The same numbers every time."""
    generator, column = torch_generator(0, "export"), torch.arange(len(streams))
    present = torch.stack([column >= 0, column % 2 == 0, column % 2 == 1, column == 0, column < 0])
    shapes = [(len(present), config.channels, *config.shape) for config in streams.values()]
    return *(torch.rand(shape, generator=generator) for shape in shapes), present


def batch_of(streams: Sequence[str], inputs: Sequence[Tensor]) -> Batch:
    """The same subjects as the model itself takes them."""
    *images, present = inputs
    rows = {name: torch.nonzero(present[:, column]).squeeze(1) for column, name in enumerate(streams)}
    present_images = {name: image[rows[name]] for name, image in zip(streams, images, strict=True) if len(rows[name])}
    return Batch(len(present), present_images, {name: rows[name] for name in present_images})


def require_equal(expected: Tensor, actual: Tensor) -> float:
    """Return the largest difference of two embeddings [B, D].

    Raises:
        RunError: it is above TOLERANCE, or not a number.
    """
    difference = float((expected - actual).abs().max())
    if not difference <= TOLERANCE:
        raise RunError(f"export: differs from the run's model by {difference:.3g}, expected at most {TOLERANCE:g}")
    return difference
