"""Weighted mean of updates whose bits do not depend on the order in which they arrive.

    mean = sum_k w_k u_k / sum_k w_k

A weight counts for the whole update, or, where experts are stacked in it, for the numbers of one expert.

Floating-point addition is not associative, addition of integers is. Each site's product w_k u_k is rounded once, to a
multiple of 2^-F, and summed as an integer that float64 holds exactly; so is each weight. Contributions are added as
they arrive: memory is one float64 array, however many sites there are.

F is the largest that stays exact: with total weight <= W and |u| <= U, both powers of two, 2^F = 2^52 / (W U). Error
against exact arithmetic, for n sites (a product of float32 and an integer weight below 2^29 is itself exact):

    |mean - exact| <= n 2^-(F+1) / sum(w) + 2^-23 |exact|

For five sites of 3,000 subject-steps (W = 2^14, U = 2^6, F = 32) the first term is below 1e-13, a hundredth of what
float32 resolves in a parameter of 1e-4. A float32 sum of five has an error of about 2^-22 |exact| that changes with the
order. int64 would hold ten bits more, and takes half as long again (`python -m simulations bench aggregate`).
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from panfm.errors import ProtocolError
from panfm.sharing.groups import Flat, Segments
from panfm.sharing.weights import Weights

UPDATE_LIMIT = 64.0
"""No parameter moves further than this in a round; an update that does is refused."""
_BITS = 52
_WEIGHT_BITS = 20
_CHUNK = 1 << 15
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
        """An empty mean.

        Args:
            segments: Which of a contribution's weights counts for which numbers; ((size, 0),): one for all.
            weight_limit: No weight sums to more than this over all contributions.
            update_limit: No contribution holds a number further from 0 than this.
        """
        self.weight_limit = weight_limit
        self.update_limit = update_limit
        self._segments = segments
        self._scale = 2.0 ** (_BITS - _exponent(weight_limit) - _exponent(update_limit))
        self._sum: NDArray[np.float64] = np.zeros(sum(length for length, _ in segments))
        self._weights = [0] * (1 + max((which for _, which in segments), default=0))

    @property
    def total_weights(self) -> Weights:
        """Sum of each weight so far."""
        return tuple(weight / 2**_WEIGHT_BITS for weight in self._weights)

    def add(self, update: Flat, weights: Weights) -> None:
        """Add one site's contribution.

        Args:
            update: float32 [size].
            weights: >= 0, rounded to a multiple of 2^-20; 0 adds nothing.
        Raises:
            ProtocolError: a number is not finite or beyond its limit, or the size differs.
        """
        self.check(update, weights)
        fixed = [round(weight * 2**_WEIGHT_BITS) for weight in weights]
        factors = [weight / 2**_WEIGHT_BITS * self._scale for weight in fixed]
        work = [(update[here], factors[which], self._sum[here]) for here, which in self._pieces()]
        if len(work) == 1:
            _add_rounded(*work[0])
        else:
            with ThreadPoolExecutor(_THREADS) as threads:
                list(threads.map(_add_rounded, *zip(*work, strict=True)))
        self._weights = [total + weight for total, weight in zip(self._weights, fixed, strict=True)]

    def mean(self) -> Flat | None:
        """The mean so far, float32; None if nobody contributed any weight.

        Where nobody did it is -0.0, which leaves every number that it is added to as it was, to the bit.
        """
        if not any(self._weights):
            return None
        divisors = [weight * self._scale for weight in self.total_weights]
        mean = np.full(len(self._sum), -0.0, dtype=np.float32)
        for here, which in self._pieces():
            if divisors[which]:
                np.divide(self._sum[here], divisors[which], out=mean[here], casting="same_kind")
        return mean

    def check(self, update: Flat, weights: Weights) -> None:
        """Raises ProtocolError if `add` would; changes nothing."""
        if update.shape != self._sum.shape or update.dtype != np.float32:
            expected = f"float32 {list(self._sum.shape)}"
            raise ProtocolError(f"update is {update.dtype} {list(update.shape)}, expected {expected}")
        if len(weights) != len(self._weights):
            raise ProtocolError(f"{len(weights)} weights, expected {len(self._weights)}")
        for weight, total in zip(weights, self.total_weights, strict=True):
            if not (weight >= 0.0 and total + weight <= self.weight_limit):
                raise ProtocolError(f"weight {weight:g}: expected >= 0 and at most {self.weight_limit:g} in all")
        if not all(_within(update[here], self.update_limit) for here, _ in self._pieces()):
            raise ProtocolError(f"update holds NaN, infinity or a number beyond {self.update_limit:g}")

    def _pieces(self) -> Iterator[tuple[slice, int]]:
        """Pieces of the segments, and the weight that counts for each."""
        start = 0
        for length, which in self._segments:
            stop = start + length
            for begin in range(start, stop, _PIECE):
                yield slice(begin, min(begin + _PIECE, stop)), which
            start = stop


def _within(update: Flat, limit: float) -> bool:
    """No number is NaN or beyond the limit. None can be where the norm is not, and that is sooner known."""
    return float(np.dot(update, update)) <= limit**2 or bool(update.min() >= -limit and update.max() <= limit)


def _add_rounded(update: Flat, factor: float, total: NDArray[np.float64]) -> None:
    """total += round(update x factor), chunk by chunk, so that what lies between stays in the cache."""
    product = np.empty(min(_CHUNK, len(update)))
    for start in range(0, len(update), _CHUNK):
        part = product[: len(update) - start]
        part[:] = update[start : start + _CHUNK]
        np.multiply(part, factor, out=part)
        np.rint(part, out=part)
        total[start : start + _CHUNK] += part


def _exponent(limit: float) -> int:
    if not (limit > 0 and math.isfinite(limit)):
        raise ValueError(f"limit {limit}: expected a positive finite number")
    return math.ceil(math.log2(limit))
