"""Weighted mean of updates whose bits do not depend on the order in which they arrive.

    mean = sum_k w_k u_k / sum_k w_k

A weight counts for the whole update, or, where experts are stacked in it, for the numbers of one expert.

Floating-point addition is not associative, addition of integers is. Each number of a site's product w_k u_k is rounded,
by itself, to an integer of units 2^-F, and the integers are summed; so are the weights. Contributions are added as they
arrive, and memory is 4 bytes a number, however many sites there are: F is the largest for which numbers up to `usual`
(U), whose weights sum to at most W, fit an int32 with a bit to spare, with W and U as powers of two

    2^F = 2^30 / (W U)

Pieces of an update in which a number lies beyond U are summed apart, as the same integers, in 64 bits. Error against
exact arithmetic, for n sites (products are float32, hence the second term):

    |mean - exact| <= n 2^-(F+1) / sum(w) + 2^-23 (sum_k w_k |u_k| / sum(w) + |exact|)

For five sites of 3,000 subject-steps at the quickstart's rate (W = 2^14, U = 2^-3) the first term is below 3e-10, a
sixth of what float32 resolves in a parameter of .02. A float32 sum of five has an error of about 2^-22 |exact| that
changes with the order (`python -m simulations bench aggregate`).
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
_Piece = tuple[slice, int]
"""Some numbers of an update, and which of its weights counts for them."""

UPDATE_LIMIT = 64.0
"""No parameter moves further than this in a round; an update that does is refused."""
USUAL = 0.25
_BITS = 30
_WEIGHT_BITS = 20
_PIECE = 1 << 18
"""Numbers that are worked on at a time: what lies between stays in the cache, and two threads, which take turns at
Python's lock between operations, seldom wait for it."""
_ROW = 1 << 12
"""Numbers whose squares are summed in float32."""
_THREADS = 2


class ExactMean:
    """Streaming weighted mean of flat float32 arrays of one size.

    Guarantees:
        order: any permutation of the same contributions gives the same bits.
        bound: the error stated above.
        all or nothing: a contribution that is refused leaves the sum as it was.
    """

    def __init__(
        self,
        segments: Segments,
        *,
        weight_limit: float,
        usual: float = USUAL,
        update_limit: float = UPDATE_LIMIT,
    ) -> None:
        """An empty mean; it takes memory with the first contribution.

        Args:
            segments: Which of a contribution's weights counts for which numbers; ((size, 0),): one for all.
            weight_limit: No weight sums to more than this over all contributions.
            usual: Few numbers lie further from 0 than this; the smaller it is, the finer the units. Larger numbers cost
                memory and time, and are as exact.
            update_limit: No contribution holds a number further from 0 than this.
        """
        self.weight_limit = weight_limit
        self.update_limit = update_limit
        self._size = sum(length for length, _ in segments)
        self._pieces = list(_cut(segments))
        self._usual = 2.0 ** _exponent(usual)
        self._scale = 2.0 ** (_BITS - _exponent(weight_limit)) / self._usual
        self._sum: NDArray[np.int32] | None = None
        self._beyond: dict[int, NDArray[np.int64]] = {}
        """First number of a piece -> sum of the contributions that are too large for `_sum`."""
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
            weights: >= 0, rounded to float32 and a multiple of 2^-20; 0 adds nothing.
            checked: `check` has let it pass just now, and need not look again.
        Raises:
            ProtocolError: a number is not finite or beyond its limit, or the size differs.
        """
        if not checked:
            self.check(update, weights)
        fixed = [round(float(np.float32(weight)) * 2**_WEIGHT_BITS) for weight in weights]
        factors = [np.float32(weight / 2**_WEIGHT_BITS * self._scale) for weight in fixed]
        total = np.zeros(self._size, np.int32) if self._sum is None else self._sum

        def add_pieces(pieces: Sequence[_Piece]) -> None:
            products, whole = np.empty(_PIECE, np.float32), np.empty(_PIECE, np.int32)
            for here, which in pieces:
                part = products[: here.stop - here.start]
                np.rint(np.multiply(update[here], factors[which], out=part), out=part)
                if _within(part, self._usual * float(factors[which])):
                    np.copyto(narrow := whole[: len(part)], part, casting="unsafe")
                    total[here] += narrow
                else:
                    self._beyond[here.start] = self._beyond.get(here.start, 0) + part.astype(np.int64)

        _in_threads(add_pieces, self._pieces)
        self._sum = total
        self._weights = [total + weight for total, weight in zip(self._weights, fixed, strict=True)]

    def mean(self) -> Flat | None:
        """The mean, float32, in the place of the sum, which is gone; None if nobody contributed any weight.

        Where nobody did it is -0.0, which leaves every number that it is added to as it was, to the bit.
        """
        if self._sum is None or not any(self._weights):
            return None
        total, mean = self._sum, self._sum.view(np.float32)
        divisors = [weight * self._scale for weight in self.total_weights]

        def divide_pieces(pieces: Sequence[_Piece]) -> None:
            for here, which in pieces:
                if divisors[which]:
                    whole = total[here] + self._beyond.pop(here.start, np.float64(0.0))
                    np.divide(whole, divisors[which], out=mean[here], casting="same_kind")
                else:
                    mean[here] = -0.0

        _in_threads(divide_pieces, self._pieces)
        self._sum = None
        return mean


def norm(update: Flat) -> float:
    """L2 norm: float32 products, summed in float64 row by row. NaN or infinite if a number is, or if it is huge."""
    squares = _in_threads(
        lambda pieces: sum(_square(update[here]) for here, _ in pieces), list(_cut(((len(update), 0),)))
    )
    return math.sqrt(sum(squares))


def _square(part: Flat) -> float:
    rows, rest = np.split(part, [len(part) // _ROW * _ROW])
    rows = rows.reshape(-1, _ROW)
    return float(np.vecdot(rows, rows).sum(dtype=np.float64)) + float(np.dot(rest, rest))


def _within(part: Flat, limit: float) -> bool:
    return bool(part.min(initial=0.0) >= -limit and part.max(initial=0.0) <= limit)


def _cut(segments: Segments) -> Iterator[_Piece]:
    """Pieces of the segments, and the weight that counts for each."""
    start = 0
    for length, which in segments:
        stop = start + length
        for begin in range(start, stop, _PIECE):
            yield slice(begin, min(begin + _PIECE, stop)), which
        start = stop


def _in_threads(work: Callable[[Sequence[_Piece]], _R], pieces: Sequence[_Piece]) -> list[_R]:
    """What each thread makes of its share of the pieces."""
    if len(pieces) <= _THREADS:
        return [work(pieces)]
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(work, [pieces[first::_THREADS] for first in range(_THREADS)]))


def _exponent(limit: float) -> int:
    if not (limit > 0 and math.isfinite(limit)):
        raise ValueError(f"limit {limit}: expected a positive finite number")
    return math.ceil(math.log2(limit))
