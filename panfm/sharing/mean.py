"""Weighted mean of updates whose bits do not depend on the order in which they arrive.

    mean = sum_k w_k u_k / sum_k w_k

A weight counts for the whole update, or, where experts are stacked in it, for the numbers of one expert.

Floating-point addition is not associative, addition of integers is. Each site's product w_k u_k is rounded once, to a
multiple of 2^-F, and summed as an integer of 64 bits; so is each weight. Rounding is an addition as well: a double of
[2^52, 2^53) counts in ones, so p + 1.5 x 2^52 is p rounded to nearest, and its bits, read as an integer, are that
integer plus a constant, which is taken off in the end, modulo 2^64. Contributions are added as they arrive: memory is
one array of 8 bytes a number, however many sites there are.

F is the largest that stays exact: with total weight <= W and |u| <= U, both powers of two, 2^F = 2^51 / (W U). Error
against exact arithmetic, for n sites (a product of float32 and an integer weight below 2^29 is itself exact):

    |mean - exact| <= n 2^-(F+1) / sum(w) + 2^-23 |exact|

For five sites of 3,000 subject-steps (W = 2^14, U = 2^6, F = 31) the first term is below 1e-13, a hundredth of what
float32 resolves in a parameter of 1e-4. A float32 sum of five has an error of about 2^-22 |exact| that changes with the
order (`python -m simulations bench aggregate`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from panfm.errors import ProtocolError
from panfm.sharing.groups import Flat, Segments
from panfm.sharing.weights import Weights

_R = TypeVar("_R")
UPDATE_LIMIT = 64.0
"""No parameter moves further than this in a round; an update that does is refused."""
_BITS = 51
_ONES = 1.5 * 2.0**52
"""A double of this size counts in ones, and has as much room below as above."""
_ONES_BITS = int(np.float64(_ONES).view(np.int64))
_WEIGHT_BITS = 20
_CHUNK = 1 << 15
"""Numbers that are worked on at a time, so that what lies between stays in the cache."""
_LARGE_CHUNK = 1 << 17
"""The same in a large update, where two threads working on less would mostly wait for Python's lock."""
_PIECE = 1 << 20
"""Numbers that a thread takes at a time."""
_THREADS = 2


class ExactMean:
    """Streaming weighted mean of flat float32 arrays of one size.

    Guarantees:
        order: any permutation of the same contributions gives the same bits.
        bound: the error stated above.
        all or nothing: a contribution that is refused leaves the sum as it was.
    """

    def __init__(self, segments: Segments, *, weight_limit: float, update_limit: float = UPDATE_LIMIT) -> None:
        """An empty mean; it takes memory with the first contribution.

        Args:
            segments: Which of a contribution's weights counts for which numbers; ((size, 0),): one for all.
            weight_limit: No weight sums to more than this over all contributions.
            update_limit: No contribution holds a number further from 0 than this.
        """
        self.weight_limit = weight_limit
        self.update_limit = update_limit
        self._size = sum(length for length, _ in segments)
        self._pieces = list(_cut(segments))
        self._chunk = max(_CHUNK, min(_LARGE_CHUNK, self._size >> 6))
        self._scale = 2.0 ** (_BITS - _exponent(weight_limit) - _exponent(update_limit))
        self._sum: NDArray[np.int64] | None = None
        """Of the contributions' integers, each with the constant."""
        self._added = 0
        self._weights = [0] * (1 + max((which for _, which in segments), default=0))

    @property
    def total_weights(self) -> Weights:
        """Sum of each weight so far."""
        return tuple(weight / 2**_WEIGHT_BITS for weight in self._weights)

    def check(self, update: Flat, weights: Weights) -> float:
        """L2 norm of an update that may be added; changes nothing. Raises ProtocolError as `add` does."""
        if update.shape != (self._size,) or update.dtype != np.float32:
            raise ProtocolError(f"update is {update.dtype} {list(update.shape)}, expected float32 {[self._size]}")
        if len(weights) != len(self._weights):
            raise ProtocolError(f"{len(weights)} weights, expected {len(self._weights)}")
        for weight, total in zip(weights, self.total_weights, strict=True):
            if not (weight >= 0.0 and total + weight <= self.weight_limit):
                raise ProtocolError(f"weight {weight:g}: expected >= 0 and at most {self.weight_limit:g} in all")
        found = norm(update)
        if not (found <= self.update_limit or _within(update, self.update_limit)):
            raise ProtocolError(f"update holds NaN, infinity or a number beyond {self.update_limit:g}")
        return found

    def add(self, update: Flat, weights: Weights, *, checked: bool = False) -> None:
        """Add one site's contribution.

        Args:
            update: float32 [size].
            weights: >= 0, rounded to a multiple of 2^-20; 0 adds nothing.
            checked: `check` has let it pass just now, and need not look again.
        Raises:
            ProtocolError: a number is not finite or beyond its limit, or the size differs.
        """
        if not checked:
            self.check(update, weights)
        fixed = [round(weight * 2**_WEIGHT_BITS) for weight in weights]
        factors = [weight / 2**_WEIGHT_BITS * self._scale for weight in fixed]
        is_first = self._sum is None
        total = np.empty(self._size, np.int64) if self._sum is None else self._sum
        _in_threads(
            lambda here, which: _add_rounded(update[here], factors[which], total[here], is_first, self._chunk),
            self._pieces,
        )
        self._sum = total
        self._added += 1
        self._weights = [total + weight for total, weight in zip(self._weights, fixed, strict=True)]

    def mean(self) -> Flat | None:
        """The mean so far, float32; None if nobody contributed any weight.

        Where nobody did it is -0.0, which leaves every number that it is added to as it was, to the bit.
        """
        if self._sum is None or not any(self._weights):
            return None
        total, constant = self._sum, _wrapped(self._added * _ONES_BITS)
        divisors = [weight * self._scale for weight in self.total_weights]
        mean = np.empty(self._size, dtype=np.float32)
        _in_threads(
            lambda here, which: _divide(total[here], constant, divisors[which], mean[here], self._chunk), self._pieces
        )
        return mean


def norm(update: Flat) -> float:
    """L2 norm: float32 products, summed in float64 chunk by chunk. NaN or infinite if a number is, or if it is huge."""
    squares = _in_threads(lambda here, _: _square(update[here]), list(_cut(((len(update), 0),))))
    return math.sqrt(sum(squares))


def _square(update: Flat) -> float:
    chunks = (update[start : start + _CHUNK] for start in range(0, len(update), _CHUNK))
    return sum(float(np.dot(chunk, chunk)) for chunk in chunks)


def _within(update: Flat, limit: float) -> bool:
    return bool(update.min() >= -limit and update.max() <= limit)


def _add_rounded(update: Flat, factor: float, total: NDArray[np.int64], is_first: bool, chunk: int) -> None:
    """total += round(update x factor) + the constant, modulo 2^64; if it is the first, total is what comes of it."""
    product = np.empty(0 if is_first else min(chunk, len(update)))
    for start in range(0, len(update), chunk):
        here = total[start : start + chunk]
        part = here.view(np.float64) if is_first else product[: len(here)]
        part[:] = update[start : start + chunk]
        part *= factor
        part += _ONES
        if not is_first:
            here += part.view(np.int64)


def _divide(total: NDArray[np.int64], constant: int, divisor: float, mean: Flat, chunk: int) -> None:
    """mean = (total - constant) / divisor, and -0.0 if nobody weighs anything."""
    if not divisor:
        mean[:] = -0.0
        return
    whole = np.empty(min(chunk, len(total)), np.int64)
    for start in range(0, len(total), chunk):
        part = whole[: len(total) - start]
        np.subtract(total[start : start + chunk], constant, out=part)
        np.divide(part, divisor, out=mean[start : start + chunk], dtype=np.float64, casting="same_kind")


def _cut(segments: Segments) -> Iterator[tuple[slice, int]]:
    """Pieces of the segments, and the weight that counts for each."""
    start = 0
    for length, which in segments:
        stop = start + length
        for begin in range(start, stop, _PIECE):
            yield slice(begin, min(begin + _PIECE, stop)), which
        start = stop


def _in_threads(work: Callable[[slice, int], _R], pieces: Sequence[tuple[slice, int]]) -> list[_R]:
    if len(pieces) <= _THREADS:
        return [work(*piece) for piece in pieces]
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(work, *zip(*pieces, strict=True)))


def _wrapped(number: int) -> int:
    """The same modulo 2^64, as int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63


def _exponent(limit: float) -> int:
    if not (limit > 0 and math.isfinite(limit)):
        raise ValueError(f"limit {limit}: expected a positive finite number")
    return math.ceil(math.log2(limit))
