"""Weighted mean of updates whose bits do not depend on the order in which they arrive.

    mean = sum_k w_k u_k / sum_k w_k

A weight counts for the whole update, or, where experts are stacked in it, for the numbers of one expert.

Floating-point addition is not associative, addition of integers is. Each number of a site's product w_k u_k is rounded,
by itself, to an integer of units 2^-F, and the integers are summed; so are the weights. Contributions are added as they
arrive, and memory is 4 bytes a number, however many sites there are: F is the largest for which numbers up to `usual`
(U), whose weights sum to at most W, fit an int32 with a bit to spare, with W and U as powers of two

    2^F = 2^30 / (W U)

Rows of an update in which a number lies beyond U are added as the same integers in 64 bits; what the sum cannot hold,
its multiples of 2^30, lies apart: 4 bytes more for a number of such a row. Error against exact arithmetic with the
weights as they are rounded, for n sites (products are float32, hence the second term):

    |mean - exact| <= n 2^-(F+1) / sum(w) + 2^-23 (sum_k w_k |u_k| / sum(w) + |exact|)

For five sites of 3,000 subject-steps at the quickstart's rate (W = 2^14, U = 2^-3) the first term is below 3e-10, a
sixth of what float32 resolves in a parameter of .02. A float32 sum of five has an error of about 2^-22 |exact| that
changes with the order (`python -m simulations bench aggregate`).

No contribution has more than `max_share` of the weight in the end (shares.py). The integers of one that weighs more are
multiplied by its capped over its own weight and rounded again, which adds half a unit to its error. For that, those of
contributions that may yet have to be capped are kept: one at a time for `max_share` >= 1/2, none where sites weigh
alike. The first contribution is not kept: until the second comes, the sum is what it added.

What was added can be taken off again, to the bit. So one pass over an update's memory, which is what time goes into,
does it all: look at a row, sum its squares for the guards, add it. A guard that then refuses leaves the sum as it was.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from panfm.errors import ProtocolError
from panfm.sharing.groups import Flat, Segments
from panfm.sharing.loops import add_rows, divide_rows
from panfm.sharing.shares import may_be_capped, water_level
from panfm.sharing.weights import Weights

_Result = TypeVar("_Result")
_Integers = NDArray[np.int32] | NDArray[np.int64]
_Kept = tuple[tuple[int, _Integers], ...]
"""Contributions: weight, in units of 2^-20, and what it adds to the sum."""

UPDATE_LIMIT = 64.0
"""No parameter moves further than this in a round; an update that does is refused."""
USUAL = 0.25
_BITS = 30
_WEIGHT_BITS = 20
_INT32 = 1 << 31
_ROUNDED = 1.0 + 2.0**-10
"""Weights that sum to their limit exceed it when rounded; for that there is room in the bit to spare."""
_SPAN = 30
"""Bits that the update limit may lie above the usual for the sum of the largest numbers to fit twice 30 bits."""
_ROW = 1 << 12
"""Numbers that are worked on at a time: they stay in the first cache, and their squares are summed in float32."""
_ROWS_FOR_TWO = 1 << 10
"""With fewer rows a second thread takes longer to start than to work."""


@dataclass
class Votes:
    """What contributions agree on: how many are above 0 in each number, less those below, as int8 or int16."""

    counted: NDArray[Any]
    """[size] of the contributions added; nothing where a contribution's weight is 0. Empty: not counted."""
    before: NDArray[Any]
    """[size] those of the round before. Empty: there are none."""
    product: float = 0.0
    """Product of the update added last with `before`."""


def no_votes() -> Votes:
    """Nothing is counted."""
    return Votes(np.zeros(0, np.int8), np.zeros(0, np.int8))


class ExactMean:
    """Streaming weighted mean of flat float32 arrays of one size.

    Guarantees:
        order: any permutation of the same contributions gives the same bits.
        bound: the error stated above.
        all or nothing: a contribution that is refused, or taken off, leaves the sum as it was.
    """

    def __init__(
        self,
        segments: Segments,
        *,
        weight_limit: float,
        max_share: float = 1.0,
        usual: float = USUAL,
        update_limit: float = UPDATE_LIMIT,
        space: Flat | None = None,
        votes: Votes | None = None,
    ) -> None:
        """An empty mean.

        Args:
            segments: Which of a contribution's weights counts for which numbers; ((size, 0),): one for all.
            weight_limit: No weight sums to more than this over all contributions.
            max_share: Largest share of a weight's sum that one of three contributions or more has in the mean.
            usual: Few numbers lie further from 0 than this; the smaller it is, the finer the units, down to 2^-30 of
                the update limit. Larger numbers cost memory and time, and are as exact.
            update_limit: No contribution holds a number further from 0 than this.
            space: float32 [size] in which to work, and in which the mean will be; its own if None.
            votes: Where signs are counted.
        """
        self.weight_limit = weight_limit
        self.update_limit = update_limit
        self._edges, self._whose = _rows(segments)
        usual_bits = max(_exponent(usual), _exponent(update_limit) - _SPAN)
        self._usual = min(2.0**usual_bits, update_limit)
        self._scale = 2.0 ** (_BITS - _exponent(weight_limit) - usual_bits)
        self._space = np.empty(self._edges[-1], np.float32) if space is None else space
        self._sum = self._space.view(np.int32)
        self._votes = votes or no_votes()
        self._helper = ThreadPoolExecutor(1)
        self._in_two(self._clear)
        self._carry = np.zeros(0, np.int32)
        """[size] once a number was too large: what is to be added to `_sum`, in units of 2^30."""
        self._carried: set[int] = set()
        """Rows in which something is."""
        self._weights = [0] * (1 + max((which for _, which in segments), default=0))
        self._max_share = max_share
        self._given: list[list[int]] = [[] for _ in self._weights]
        """Each weight's contributions that are not 0."""
        self._kept: list[_Kept] = [() for _ in self._weights]
        """Of each weight, the contributions that may have to be capped, unless the sum holds no other."""
        self._kept_before = self._kept

    @property
    def total_weights(self) -> Weights:
        """Sum of each weight so far."""
        return tuple(weight / 2**_WEIGHT_BITS for weight in self._weights)

    def add(self, update: Flat, weights: Weights) -> float:
        """Add one site's contribution.

        Args:
            update: float32 [size].
            weights: >= 0, rounded to float32 and a multiple of 2^-20; 0 adds nothing.
        Returns:
            L2 norm of the update.
        Raises:
            ProtocolError: a number is not finite or beyond its limit, or the size differs.
        """
        self._check(update, weights)
        self._kept_before = list(self._kept)
        self._keep_first(weights)
        squares, beyond = self._put(update, weights, sign=1)
        if not all(_within(update[self._row(row)], self.update_limit) for row in beyond):
            self._put(update, weights, sign=-1)
            self._kept = self._kept_before
            raise ProtocolError(f"update holds NaN, infinity or a number beyond {self.update_limit:g}")
        self._count(update, weights, beyond, sign=1)
        self._keep(update, weights)
        return math.sqrt(squares)

    def take_off(self, update: Flat, weights: Weights) -> None:
        """Undo the last `add`, which was of the same contribution."""
        _, beyond = self._put(update, weights, sign=-1)
        self._count(update, weights, beyond, sign=-1)
        for which, weight in enumerate(_fixed(weights)):
            if weight:
                self._given[which].remove(weight)
        self._kept = self._kept_before

    def mean(self) -> Flat | None:
        """The mean, float32, in the place of the sum, which is gone; None if nobody contributed any weight.

        Where nobody did it is -0.0, which leaves every number that it is added to as it was, to the bit.
        """
        if not any(self._weights):
            return None
        self._cap()
        divisors = np.asarray(self.total_weights) * self._scale
        apart = self._carry.view(np.float32)
        for row in self._carried:
            apart[self._row(row)] = self._whole(row) / divisors[self._whose[row]]
        self._in_two(lambda *rows: divide_rows(self._sum, self._space, self._edges, self._whose, divisors, *rows))
        for row in self._carried:
            self._space[self._row(row)] = apart[self._row(row)]
        self._weights = [0] * len(self._weights)
        return self._space

    def _check(self, update: Flat, weights: Weights) -> None:
        check_size(update, len(self._space))
        if len(weights) != len(self._weights):
            raise ProtocolError(f"{len(weights)} weights, expected {len(self._weights)}")
        for weight, total in zip(weights, self.total_weights, strict=True):
            if not (weight >= 0.0 and total + weight <= _ROUNDED * self.weight_limit):
                raise ProtocolError(f"weight {weight:g}: expected >= 0 and at most {self.weight_limit:g} in all")

    def _put(self, update: Flat, weights: Weights, *, sign: int) -> tuple[float, list[int]]:
        """Add or subtract all rows but those with a number beyond the usual; sum of all squares, and which they are."""
        factors, beyond = self._factors(weights), np.zeros(len(self._whose), np.bool_)
        limit = np.float32(self._usual)
        votes, before = self._votes.counted, self._votes.before

        def add(first: int, last: int) -> tuple[float, float]:
            with_sign = sign * factors
            return add_rows(
                self._sum, update, self._edges, self._whose, with_sign, limit, beyond, votes, sign, before, first, last
            )

        squares, products = zip(*self._in_two(add), strict=True)
        self._votes.product = sum(products)
        return sum(squares), np.flatnonzero(beyond).tolist()

    def _count(self, update: Flat, weights: Weights, beyond: Sequence[int], *, sign: int) -> None:
        factors = self._factors(weights)
        if beyond and not len(self._carry):
            self._carry = np.zeros_like(self._sum)
        for row in beyond:
            part = np.rint(update[self._row(row)] * factors[self._whose[row]]).astype(np.int64)
            self._split(row, self._whole(row) + sign * part)
        self._weights = [total + sign * weight for total, weight in zip(self._weights, _fixed(weights), strict=True)]

    def _keep_first(self, weights: Weights) -> None:
        """Before another is added: keep the first contribution of each weight if the second leaves it in question."""
        for which, weight in enumerate(_fixed(weights)):
            if weight and len(self._given[which]) == 1:
                (first,) = self._given[which]
                if may_be_capped(first, [first, weight], self._max_share):
                    self._kept[which] = ((first, self._integers(which, self._whole)),)

    def _keep(self, update: Flat, weights: Weights) -> None:
        """After one was added: keep it if it may have to be capped, and let go of those that no longer may."""
        factors = self._factors(weights)
        for which, weight in enumerate(_fixed(weights)):
            if not weight:
                continue
            given = self._given[which]
            given.append(weight)
            if len(given) == 1:
                continue
            kept = [one for one in self._kept[which] if may_be_capped(one[0], given, self._max_share)]
            if may_be_capped(weight, given, self._max_share):
                kept.append((weight, self._integers(which, self._products(update, factors[which]))))
            self._kept[which] = tuple(kept)

    def _products(self, update: Flat, factor: np.float32) -> Callable[[int], NDArray[Any]]:
        return lambda row: np.rint(update[self._row(row)] * factor)

    def _integers(self, which: int, of_row: Callable[[int], NDArray[Any]]) -> _Integers:
        """What one contribution adds to the numbers of a weight; int32 unless one of them is too large for it."""
        rows = np.flatnonzero(self._whose == which)
        whole: _Integers = np.empty(int((self._edges[rows + 1] - self._edges[rows]).sum()), np.int32)
        start = 0
        for row in rows.tolist():
            part = of_row(row)
            if whole.dtype == np.int32 and abs(part).max() >= _INT32:
                whole = whole.astype(np.int64)
            whole[start : (start := start + len(part))] = part
        return whole

    def _cap(self) -> None:
        """Replace what weighs too much by as much of it as may count."""
        for which, given in enumerate(self._given):
            if (level := water_level(given, self._max_share)) is None:
                continue
            fixed = _float32_below(math.floor(level))
            for weight, integers in self._kept[which]:
                if weight > fixed:
                    self._lower(which, integers, fixed / weight)
                    self._weights[which] -= weight - fixed
        self._kept = [() for _ in self._weights]

    def _lower(self, which: int, integers: _Integers, factor: float) -> None:
        """Take a contribution's integers off, and add as many times `factor`."""
        start = 0
        for row in np.flatnonzero(self._whose == which).tolist():
            at = self._row(row)
            part = integers[start : (start := start + at.stop - at.start)].astype(np.int64)
            whole = self._whole(row) + np.rint(part * factor).astype(np.int64) - part
            if len(self._carry):
                self._split(row, whole)
            else:
                self._sum[at] = whole

    def _whole(self, row: int) -> NDArray[np.int64]:
        at = self._row(row)
        return self._sum[at] + (self._carry[at].astype(np.int64) << _BITS if len(self._carry) else np.int64(0))

    def _split(self, row: int, whole: NDArray[np.int64]) -> None:
        """Keep the sum of a row in two parts, the lower at most 2^29: what is usual can still be added to it."""
        at = self._row(row)
        self._carry[at] = (whole + (1 << _BITS - 1)) >> _BITS
        self._sum[at] = whole - (self._carry[at].astype(np.int64) << _BITS)
        if self._carry[at].any():
            self._carried.add(row)
        else:
            self._carried.discard(row)

    def _factors(self, weights: Weights) -> Flat:
        return np.asarray([weight / 2**_WEIGHT_BITS * self._scale for weight in _fixed(weights)], np.float32)

    def _clear(self, first: int, last: int) -> None:
        self._sum[self._edges[first] : self._edges[last]] = 0

    def _row(self, row: int) -> slice:
        return slice(self._edges[row], self._edges[row + 1])

    def _in_two(self, work: Callable[[int, int], _Result]) -> list[_Result]:
        """What work(first row, last row + 1) gives for all rows, or, if they are many, for each half in a thread."""
        rows = len(self._whose)
        if rows < _ROWS_FOR_TWO:
            return [work(0, rows)]
        half = self._helper.submit(work, 0, rows // 2)
        return [work(rows // 2, rows), half.result()]


def check_size(update: Flat, size: int) -> None:
    """Raises ProtocolError if an update is not float32 [size]."""
    if update.shape != (size,) or update.dtype != np.float32:
        raise ProtocolError(f"update is {update.dtype} {list(update.shape)}, expected float32 {[size]}")


def _within(part: Flat, limit: float) -> bool:
    return bool(part.min() >= -limit and part.max() <= limit)


def _fixed(weights: Weights) -> list[int]:
    return [round(float(np.float32(weight)) * 2**_WEIGHT_BITS) for weight in weights]


def _float32_below(number: int) -> int:
    """The largest integer up to this one that float32 holds exactly."""
    spare = max(number.bit_length() - 24, 0)
    return number >> spare << spare


def _rows(segments: Segments) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each row starts, and the last ends; and which weight counts for it. No row reaches into two segments."""
    edges, whose = [0], []
    for length, which in segments:
        start = edges[-1]
        stops = [*range(start + _ROW, start + length, _ROW), start + length] if length else []
        edges += stops
        whose += [which] * len(stops)
    return np.asarray(edges, np.int64), np.asarray(whose, np.int64)


def _exponent(limit: float) -> int:
    if not (limit > 0 and math.isfinite(limit)):
        raise ValueError(f"limit {limit}: expected a positive finite number")
    return math.ceil(math.log2(limit))
