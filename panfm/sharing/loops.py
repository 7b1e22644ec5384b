"""Loops over the numbers of an update, compiled: numpy reads and writes the memory anew for every operation.

Rows are numbers edges[row] to edges[row + 1]; `whose` says which weight counts for each. Each function takes the rows
from `first` up to `last`, and lets other Python threads go on meanwhile.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from panfm.sharing.groups import Flat

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Indices = NDArray[np.int64]


def _compiled(function: _Function) -> _Function:
    """Machine code, made at the first call; sums of floats may be reordered, nothing else.

    It is not kept on disk: a disk that is full or may not be written to would end the round, to spare a process 2 s.
    """
    return cast(_Function, numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc"})(function))


@_compiled
def add_rows(
    total: NDArray[np.int32],
    update: Flat,
    edges: _Indices,
    whose: _Indices,
    factors: Flat,
    limit: np.float32,
    beyond: NDArray[np.bool_],
    votes: NDArray[Any],
    vote: int,
    before: NDArray[Any],
    first: int,
    last: int,
) -> tuple[float, float]:
    """Add round(factor * update) to the total; a row with a number beyond the limit, or NaN, is only marked.

    Args:
        votes: Signs are added to it, `vote` times each, where the factor is not 0; empty: they are not.
        before: What the update is multiplied with; empty: with nothing.
    Returns:
        Sum of the squares of all rows, and the product of the update with `before`: each row's in float32, theirs in
        float64.
    """
    squares, product = np.float64(0.0), np.float64(0.0)
    for row in range(first, last):
        numbers, factor = update[edges[row] : edges[row + 1]], factors[whose[row]]
        squares += _squares(numbers)
        if len(before):
            product += _product(numbers, before[edges[row] : edges[row + 1]])
        if len(votes) and factor != 0:
            _vote(votes[edges[row] : edges[row + 1]], numbers, vote)
        beyond[row] = _is_beyond(numbers, limit)
        if not beyond[row]:
            _add(total[edges[row] : edges[row + 1]], numbers, factor)
    return squares, product


@_compiled
def divide_rows(
    total: NDArray[np.int32],
    mean: Flat,
    edges: _Indices,
    whose: _Indices,
    divisors: NDArray[np.float64],
    first: int,
    last: int,
) -> None:
    """Divide in float64; -0.0 where the divisor is 0. The mean may lie where the total does."""
    for row in range(first, last):
        numbers = total[edges[row] : edges[row + 1]].copy()
        _divide(mean[edges[row] : edges[row + 1]], numbers, divisors[whose[row]])


@_compiled
def _squares(numbers: Flat) -> np.float32:
    total = np.float32(0.0)
    for index in range(len(numbers)):
        total += numbers[index] * numbers[index]
    return total


@_compiled
def _product(numbers: Flat, before: NDArray[Any]) -> np.float32:
    total = np.float32(0.0)
    for index in range(len(numbers)):
        total += numbers[index] * np.float32(before[index])
    return total


@_compiled
def _vote(votes: NDArray[Any], numbers: Flat, vote: int) -> None:
    for index in range(len(votes)):
        votes[index] += vote * (np.int8(numbers[index] > 0) - np.int8(numbers[index] < 0))


@_compiled
def _is_beyond(numbers: Flat, limit: np.float32) -> bool:
    found = np.int32(0)
    for index in range(len(numbers)):
        found |= np.int32(not (abs(numbers[index]) <= limit))
    return found != 0


@_compiled
def _add(total: NDArray[np.int32], numbers: Flat, factor: np.float32) -> None:
    for index in range(len(total)):
        total[index] += np.int32(np.rint(numbers[index] * factor))


@_compiled
def _divide(mean: Flat, numbers: NDArray[np.int32], divisor: float) -> None:
    for index in range(len(mean)):
        mean[index] = np.float32(numbers[index] / divisor) if divisor else np.float32(-0.0)
