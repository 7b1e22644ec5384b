"""Cases of a parametrised test, of which the default suite runs some and the slow tests the others."""

from collections.abc import Collection, Iterable

import pytest


def quick(cases: Iterable, quick_ones: int | Collection) -> list:
    """Mark the cases slow that are not among the first few, or not among those given.

    Tuples are the arguments of one case each.
    """
    listed = list(cases)
    kept = listed[:quick_ones] if isinstance(quick_ones, int) else quick_ones
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in kept else pytest.mark.slow)
        for case in listed
    ]
