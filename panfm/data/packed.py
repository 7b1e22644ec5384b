"""Prepared images in the type of their sources: numbers of 8 or 16 bits, with the range of each image.

    value = low + (high - low) k / K        K = 255 or 65535, low and high the least and greatest value of a volume

A source of as many bits tells apart no more than K + 1 values, so that rounding to k moves a value by at most half of
the least difference that the source can show. 8-bit pictures are k / 255 already, and come back to the bit.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

TYPES: dict[int, np.dtype[Any]] = {8: np.dtype("u1"), 16: np.dtype("<u2"), 32: np.dtype("<f4")}
"""Bits of a source -> type in which its prepared image is kept."""
FLOAT16: np.dtype[Any] = np.dtype("<f2")
"""For images of floats, where a site chooses it."""


class Packed(NamedTuple):
    """One image, or several with their ranges, as they are kept."""

    stored: NDArray[Any]
    low: Any = np.float32(0.0)
    high: Any = np.float32(1.0)

    @classmethod
    def of(cls, image: NDArray[np.float32], kept: np.dtype[Any], *, is_volume: bool) -> Self:
        """Convert one image in [0, 1] to the type in which it is kept."""
        if kept.kind == "f":
            return cls(image.astype(kept, copy=False))
        low, high = (image.min(), image.max()) if is_volume else (np.float32(0.0), np.float32(1.0))
        scale = np.float32(_greatest(kept) / max(float(high) - float(low), 1e-30))
        return cls(np.rint((image - low) * scale).astype(kept), low, high)

    def values(self) -> NDArray[np.float32]:
        """Convert back to float32."""
        if self.stored.dtype == np.float32:
            return self.stored
        values = np.divide(self.stored, _greatest(self.stored.dtype), dtype=np.float32)
        values *= self.high - self.low
        values += self.low
        return np.minimum(values, self.high, out=values)


class PackedImages:
    """Images [P, C, *shape] as they are kept; an index gives float32, as that of an array would."""

    dtype = np.dtype(np.float32)

    def __init__(self, stored: NDArray[Any], ranges: NDArray[np.float32]) -> None:
        """Take images and their least and greatest values [P, 2]."""
        self.stored, self.ranges = stored, ranges
        self.shape = stored.shape

    def __len__(self) -> int:
        """P."""
        return len(self.stored)

    def __getitem__(self, index: Any) -> NDArray[np.float32]:
        """Convert the images at an index."""
        if isinstance(index, tuple):
            inner = index[1:] if isinstance(index[0], int | np.integer) else (slice(None), *index[1:])
            return np.asarray(self[index[0]][inner])
        stored, axes = self.stored[index], len(self.shape) - 1
        per_image = (*stored.shape[:-axes], *(1,) * axes)
        return Packed(stored, *(self.ranges[index, end].reshape(per_image) for end in (0, 1))).values()

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        """Convert one image after the other."""
        return map(self.__getitem__, range(len(self)))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """All images as one array."""
        return self[:].astype(dtype or np.float32, copy=False)


def integer_bits(kind: np.dtype[Any]) -> int:
    """8 or 16 for integers of so many bits, else 32."""
    return 8 * kind.itemsize if kind.kind in "iu" and kind.itemsize <= 2 else 32


def _greatest(kept: np.dtype[Any]) -> np.float32:
    """K: what stands for the end of the range."""
    return np.float32(np.iinfo(kept).max if kept.kind == "u" else 1.0)
