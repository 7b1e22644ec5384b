"""The missing-organ grid: how the AUC falls as organs are taken from complete test subjects.

An organ goes with all its streams. The probe is fitted once, before; only the test features change.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from panfm.anatomy import parse_stream
from panfm.seeds import numpy_generator

FeaturesOf = Callable[[tuple[str, ...]], NDArray[np.floating]]
"""Test features [n, dim] when only these streams are there."""


def missing_grid(
    features_of: FeaturesOf,
    mean_auc: Callable[[NDArray[np.floating]], float],
    streams: Sequence[str],
    *,
    dominant: Iterable[str] = (),
    draws: int = 3,
    seed: int = 0,
) -> dict[str, float]:
    """AUC with organs missing, by metric name.

    `auc` complete; `auc_missing_<k>` mean over sets of k organs removed (all sets for k = 1 and for one organ left,
    else at most `draws` seeded ones, the same for every model); `auc_drop_<organ>` what the removal of one organ costs
    (complete minus without it); `auc_only_<organ>` with it alone; `auc_no_dominant` without the dominant organs.

    Args:
        mean_auc: Mean AUC over labels of test features.
        streams: Streams of the complete test subjects.
    """
    organs = list(dict.fromkeys(parse_stream(stream)[0] for stream in streams))
    known: dict[frozenset[str], float] = {}

    def without(removed: Iterable[str]) -> float:
        gone = frozenset(removed) & frozenset(organs)
        if gone not in known:
            left = tuple(stream for stream in streams if parse_stream(stream)[0] not in gone)
            known[gone] = mean_auc(features_of(left))
        return known[gone]

    grid = {"auc": without(())}
    for count in range(1, len(organs)):
        chosen = removed_sets(organs, count, draws, seed)
        grid[f"auc_missing_{count}"] = float(np.mean([without(removed) for removed in chosen]))
    if len(organs) > 1:
        grid |= {f"auc_drop_{organ}": grid["auc"] - without([organ]) for organ in organs}
        grid |= {f"auc_only_{organ}": without(set(organs) - {organ}) for organ in organs}
    if set(dominant) & set(organs) and set(organs) - set(dominant):
        grid["auc_no_dominant"] = without(dominant)
    return grid


def removed_sets(organs: Sequence[str], count: int, draws: int, seed: int) -> list[tuple[str, ...]]:
    """Which sets of `count` organs are removed: all where single organs go or stay, else `draws` different ones."""
    every = list(itertools.combinations(sorted(organs), count))
    if count in (1, len(organs) - 1) or len(every) <= draws:
        return every
    chosen = numpy_generator(seed, "missing", count).choice(len(every), size=draws, replace=False)
    return [every[index] for index in sorted(chosen)]
