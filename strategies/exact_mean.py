"""Weighted mean of updates, with the same bits in whatever order they arrive.

    mean = sum_k w_k u_k / sum_k w_k             u_k: update of site k, w_k: its weight in the group, or of one expert

Addition of floats depends on the order, addition of integers does not. So each number of a product w_k u_k is rounded
to an integer of units 2^-F, and the integers are summed; the weights too, in units of 2^-20. A sum takes 4 bytes a
number, however many sites there are. F is the largest with which numbers up to `usual` (U), with weights that sum to W
at most, fit an int32 and leave one bit to spare; W and U are rounded up to powers of two:

    2^F = 2^30 / (W U)

Larger numbers: a row of an update (4,096 numbers) with a number beyond U is added in 64 bits. What int32 cannot hold,
multiples of 2^30, is kept in a second array, which takes 4 bytes a number more.

Error, for n sites, against exact arithmetic with the rounded weights; products are float32, hence the second term:

    |mean - exact| <= n 2^-(F+1) / sum(w) + 2^-23 (sum_k w_k |u_k| / sum(w) + |exact|)

For five sites of 3,000 subject-steps at a learning rate of .003 (W = 2^14, U = 2^-3) the first term is below
3e-10; a float32 sum of five has an error of about 2^-22 |exact|, which changes with the order.

Caps: in the end no contribution has more than `max_share` of the weight (weight_caps.py). The integers of one that
weighs more are multiplied by its capped over its own weight and rounded again, which adds half a unit to its error.
Contributions that may still have to be capped are kept until then: one at a time for `max_share` >= 1/2, none if all
sites weigh alike.

Remove: the last contribution can be removed again, to the bit. So one pass over an update computes its norm, adds it
and counts its signs, and the guards judge afterwards. Time goes into reading memory; that is why there is one pass.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from panfm.errors import ProtocolError
from panfm.sharing.groups import Flat, Segments
from panfm.sharing.weights import Weights
from strategies.exact_kernel import add_rows, divide_rows
from strategies.weight_caps import may_be_capped, water_level

_Result = TypeVar("_Result")
_Integers = NDArray[np.int32] | NDArray[np.int64]
_Kept = tuple[tuple[int, _Integers], ...]
"""Contributions: weight in units of 2^-20, and the integers it adds to the sum."""

UPDATE_LIMIT = 64.0
"""No parameter moves further than this in a round; an update that does is refused."""
USUAL = 0.25
"""Few numbers of an update lie further from 0; groups with a known learning rate have a finer value."""
_BITS = 30
_WEIGHT_BITS = 20
_INT32 = 1 << 31
_ROUNDED = 1.0 + 2.0**-10
"""Weights that sum to their limit may exceed it when rounded; the bit to spare has room for that."""
_SPAN = 30
"""Most bits from usual numbers to the update limit; sums of the largest numbers then fit two times 30 bits."""
_ROW = 1 << 12
"""Numbers in a row: they stay in the first cache, and their squares are summed in float32."""
_ROWS_FOR_TWO = 1 << 10
"""With fewer rows a second thread takes longer to start than to work."""


@dataclass
class Votes:
    """Sum of the signs of all contributions, number by number, as int8 or int16."""

    counted: NDArray[Any] = field(default_factory=lambda: np.zeros(0, np.int8))
    """[size] of the contributions added with a weight above 0. Empty: signs are not counted."""
    before: NDArray[Any] = field(default_factory=lambda: np.zeros(0, np.int8))
    """[size] of the round before. Empty: there are none."""
    product: float = 0.0
    """Dot product of the update added last with `before`."""


class ExactMean:
    """Streaming weighted mean of flat float32 arrays of one size.

    Guarantees:
        order: any permutation of the same contributions gives the same bits.
        bound: the error stated above.
        all or nothing: a contribution that is refused or removed leaves the sum as it was.
    """

    def __init__(
        self,
        segments: Segments,
        *,
        weight_limit: float,
        max_share: float = 1.0,
        usual: float = USUAL,
        space: Flat | None = None,
        votes: Votes | None = None,
    ) -> None:
        """Create a mean without contributions.

        Args:
            segments: Which of a contribution's weights counts for which numbers; ((size, 0),): one weight for all.
            weight_limit: Largest sum of one weight over all contributions.
            max_share: Largest share of the weight that one of three contributions or more has in the mean.
            usual: Few numbers lie further from 0 than this. A smaller value gives finer units, down to 2^-30 of the
                update limit; larger numbers cost memory and time, and are as exact.
            space: Memory, float32 [size], for the sum and later the mean; allocated if None.
            votes: Where signs are counted.
        """
        self.weight_limit = weight_limit
        self._edges, self._weight_of_row = _cut_into_rows(segments)
        usual_bits = max(_exponent(usual), _exponent(UPDATE_LIMIT) - _SPAN)
        self._usual = min(2.0**usual_bits, UPDATE_LIMIT)
        self._scale = 2.0 ** (_BITS - _exponent(weight_limit) - usual_bits)
        self._space = np.empty(self._edges[-1], np.float32) if space is None else space
        self._sum = self._space.view(np.int32)
        self._votes = votes or Votes()
        self._helper = ThreadPoolExecutor(1)
        self._on_two_threads(self._clear)
        self._overflow = np.zeros(0, np.int32)
        """[size] once a number was too large: to be added to `_sum`, in units of 2^30."""
        self._overflow_rows: set[int] = set()
        """Rows whose overflow is not 0."""
        self._weights = [0] * (1 + max((which for _, which in segments), default=0))
        self._max_share = max_share
        self._added: list[list[int]] = [[] for _ in self._weights]
        """For each weight: those of all contributions that are above 0, in units of 2^-20."""
        self._kept: list[_Kept] = [() for _ in self._weights]
        """For each weight: contributions that may have to be capped; a single one is still read off the sum."""
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
        squares, beyond = self._add_usual_rows(update, weights, sign=1)
        if not all(_is_within(update[self._slice(row)], UPDATE_LIMIT) for row in beyond):
            self._add_usual_rows(update, weights, sign=-1)
            self._kept = self._kept_before
            raise ProtocolError(f"update holds NaN, infinity or a number beyond {UPDATE_LIMIT:g}")
        self._add_large_rows(update, weights, beyond, sign=1)
        self._keep(update, weights)
        return math.sqrt(squares)

    def remove(self, update: Flat, weights: Weights) -> None:
        """Undo the last `add`, which was of the same contribution."""
        _, beyond = self._add_usual_rows(update, weights, sign=-1)
        self._add_large_rows(update, weights, beyond, sign=-1)
        for which, weight in enumerate(_fixed_point(weights)):
            if weight:
                self._added[which].remove(weight)
        self._kept = self._kept_before

    def mean(self) -> Flat | None:
        """Return the mean, float32, in the memory of the sum; None if no weight was above 0.

        A number to which nobody contributed weight is -0.0: adding it to any number leaves that as it was, to the bit.
        """
        if not any(self._weights):
            return None
        self._cap()
        divisors = np.asarray(self.total_weights) * self._scale
        apart = self._overflow.view(np.float32)
        for row in self._overflow_rows:
            apart[self._slice(row)] = self._row_sum(row) / divisors[self._weight_of_row[row]]
        self._on_two_threads(partial(divide_rows, self._sum, self._space, self._edges, self._weight_of_row, divisors))
        for row in self._overflow_rows:
            self._space[self._slice(row)] = apart[self._slice(row)]
        self._weights = [0] * len(self._weights)
        return self._space

    def _check(self, update: Flat, weights: Weights) -> None:
        check_size(update, len(self._space))
        if len(weights) != len(self._weights):
            raise ProtocolError(f"{len(weights)} weights, expected {len(self._weights)}")
        for weight, total in zip(weights, self.total_weights, strict=True):
            if not (weight >= 0.0 and total + weight <= _ROUNDED * self.weight_limit):
                raise ProtocolError(f"weight {weight:g}: expected >= 0 and at most {self.weight_limit:g} in all")

    def _add_usual_rows(self, update: Flat, weights: Weights, *, sign: int) -> tuple[float, list[int]]:
        """Add or subtract all rows without a large number; return the sum of all squares, and the other rows."""
        factors, beyond = sign * self._factors(weights), np.zeros(len(self._weight_of_row), np.bool_)
        add = partial(add_rows, self._sum, update, self._edges, self._weight_of_row, factors, np.float32(self._usual))
        add = partial(add, beyond, self._votes.counted, sign, self._votes.before)
        squares, products = zip(*self._on_two_threads(add), strict=True)
        self._votes.product = sum(products)
        return sum(squares), np.flatnonzero(beyond).tolist()

    def _add_large_rows(self, update: Flat, weights: Weights, beyond: Sequence[int], *, sign: int) -> None:
        """Add or subtract rows with a large number in 64 bits; count the weights."""
        factors = self._factors(weights)
        if beyond and not len(self._overflow):
            self._overflow = np.zeros_like(self._sum)
        for row in beyond:
            part = np.rint(update[self._slice(row)] * factors[self._weight_of_row[row]]).astype(np.int64)
            self._store_row_sum(row, self._row_sum(row) + sign * part)
        added = _fixed_point(weights)
        self._weights = [total + sign * weight for total, weight in zip(self._weights, added, strict=True)]

    def _keep_first(self, weights: Weights) -> None:
        """Before the second contribution is added: copy the first off the sum if it may have to be capped."""
        for which, weight in enumerate(_fixed_point(weights)):
            if weight and len(self._added[which]) == 1:
                (first,) = self._added[which]
                if may_be_capped(first, [first, weight], self._max_share):
                    self._kept[which] = ((first, self._integers(which, self._row_sum)),)

    def _keep(self, update: Flat, weights: Weights) -> None:
        """After a contribution is added: keep it if it may have to be capped; drop those that no longer may."""
        factors = self._factors(weights)
        for which, weight in enumerate(_fixed_point(weights)):
            if not weight:
                continue
            added = self._added[which]
            added.append(weight)
            if len(added) == 1:
                continue
            kept = [one for one in self._kept[which] if may_be_capped(one[0], added, self._max_share)]
            if may_be_capped(weight, added, self._max_share):
                kept.append((weight, self._integers(which, self._products(update, factors[which]))))
            self._kept[which] = tuple(kept)

    def _products(self, update: Flat, factor: np.float32) -> Callable[[int], NDArray[Any]]:
        return lambda row: np.rint(update[self._slice(row)] * factor)

    def _integers(self, which: int, of_row: Callable[[int], NDArray[Any]]) -> _Integers:
        """Integers that a contribution adds to the numbers of one weight; int64 if one does not fit int32."""
        rows = np.flatnonzero(self._weight_of_row == which)
        whole: _Integers = np.empty(int((self._edges[rows + 1] - self._edges[rows]).sum()), np.int32)
        start = 0
        for row in rows.tolist():
            part = of_row(row)
            if whole.dtype == np.int32 and abs(part).max() >= _INT32:
                whole = whole.astype(np.int64)
            whole[start : (start := start + len(part))] = part
        return whole

    def _cap(self) -> None:
        """Lower contributions that weigh more than their cap."""
        for which, added in enumerate(self._added):
            if (level := water_level(added, self._max_share)) is None:
                continue
            fixed = _float32_below(math.floor(level))
            for weight, integers in self._kept[which]:
                if weight > fixed:
                    self._scale_contribution(which, integers, fixed / weight)
                    self._weights[which] -= weight - fixed
        self._kept = [() for _ in self._weights]

    def _scale_contribution(self, which: int, integers: _Integers, factor: float) -> None:
        """Subtract a contribution's integers, and add `factor` times as much."""
        start = 0
        for row in np.flatnonzero(self._weight_of_row == which).tolist():
            at = self._slice(row)
            part = integers[start : (start := start + at.stop - at.start)].astype(np.int64)
            whole = self._row_sum(row) + np.rint(part * factor).astype(np.int64) - part
            if len(self._overflow):
                self._store_row_sum(row, whole)
            else:
                self._sum[at] = whole

    def _row_sum(self, row: int) -> NDArray[np.int64]:
        at = self._slice(row)
        return self._sum[at] + (self._overflow[at].astype(np.int64) << _BITS if len(self._overflow) else np.int64(0))

    def _store_row_sum(self, row: int, whole: NDArray[np.int64]) -> None:
        """Split the sum of a row into overflow and a rest of at most 2^29, which has room for usual numbers."""
        at = self._slice(row)
        self._overflow[at] = (whole + (1 << _BITS - 1)) >> _BITS
        self._sum[at] = whole - (self._overflow[at].astype(np.int64) << _BITS)
        if self._overflow[at].any():
            self._overflow_rows.add(row)
        else:
            self._overflow_rows.discard(row)

    def _factors(self, weights: Weights) -> Flat:
        return np.asarray([weight / 2**_WEIGHT_BITS * self._scale for weight in _fixed_point(weights)], np.float32)

    def _clear(self, first: int, last: int) -> None:
        self._sum[self._edges[first] : self._edges[last]] = 0

    def _slice(self, row: int) -> slice:
        return slice(self._edges[row], self._edges[row + 1])

    def _on_two_threads(self, work: Callable[[int, int], _Result]) -> list[_Result]:
        """Call work(first row, last row + 1) for all rows, or on two threads for each half if there are many."""
        rows = len(self._weight_of_row)
        if rows < _ROWS_FOR_TWO:
            return [work(0, rows)]
        half = self._helper.submit(work, 0, rows // 2)
        return [work(rows // 2, rows), half.result()]


def check_size(update: Flat, size: int) -> None:
    """Raises ProtocolError if an update is not float32 [size]."""
    if update.shape != (size,) or update.dtype != np.float32:
        raise ProtocolError(f"update is {update.dtype} {list(update.shape)}, expected float32 {[size]}")


def _is_within(part: Flat, limit: float) -> bool:
    return bool(part.min() >= -limit and part.max() <= limit)


def _fixed_point(weights: Weights) -> list[int]:
    return [round(float(np.float32(weight)) * 2**_WEIGHT_BITS) for weight in weights]


def _float32_below(number: int) -> int:
    """The largest integer up to this one that float32 holds exactly."""
    spare = max(number.bit_length() - 24, 0)
    return number >> spare << spare


def _cut_into_rows(segments: Segments) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the edges of the rows, and which weight counts for each row. No row reaches into two segments."""
    edges, weight_of_row = [0], []
    for length, which in segments:
        start = edges[-1]
        stops = [*range(start + _ROW, start + length, _ROW), start + length] if length else []
        edges += stops
        weight_of_row += [which] * len(stops)
    return np.asarray(edges, np.int64), np.asarray(weight_of_row, np.int64)


def _exponent(limit: float) -> int:
    if not (limit > 0 and math.isfinite(limit)):
        raise ValueError(f"limit {limit}: expected a positive finite number")
    return math.ceil(math.log2(limit))
