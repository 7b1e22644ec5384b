"""The order in which a round draws its batches: which subjects, and which streams their views show.

By default a batch is of any subjects, with all their streams. An objective that compares subjects within a batch asks
for one stream at a time (`ObjectiveConfig.streams_per_batch`): streams then take turns, in a new seeded order each time
that all have had one, whatever the number of their holders. Pairs of streams take turns with them where it asks for
pairs: of the same subjects, one view shows the one stream and the other view the other.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from panfm.config import RunConfig
from panfm.data.store import ImageStore
from panfm.errors import DataError
from panfm.seeds import numpy_generator

Drawn = tuple[NDArray[np.int64], Sequence[Collection[str]]]
"""Subjects of a batch, as indices into the store, and the streams that each of their views shows."""


def draw_order(
    run: RunConfig, streams: Sequence[str], store: ImageStore, indices: NDArray[np.int64], site: str, round_number: int
) -> Iterator[Drawn]:
    """The batches of a round, without end.

    Args:
        streams: Those that are trained.
        indices: Subjects to draw from, as indices into the store.
    Raises:
        DataError: one stream at a time is asked for, and no two of the subjects hold the same.
    """
    generator, size = partial(numpy_generator, run.seed, site, round_number), run.train.batch_size
    if run.objective.streams_per_batch == "all":
        views = [streams] * run.objective.num_views
        return ((subjects, views) for subjects in batches(indices, size, generator("order")))
    turns = stream_turns(streams, store, indices, pairs=run.objective.streams_per_batch == "one-or-pair")
    orders = {turn: batches(holders, size, generator("order", *turn)) for turn, holders in turns.items()}
    return take_turns(orders, generator("turns"))


def take_turns(
    orders: Mapping[tuple[str, ...], Iterator[NDArray[np.int64]]], generator: np.random.Generator
) -> Iterator[Drawn]:
    """Yield a batch of each turn's order, in a new order of the turns each time that all have had one."""
    turns = list(orders)
    while True:
        for number in generator.permutation(len(turns)):
            turn = turns[number]
            yield next(orders[turn]), [(turn[0],), (turn[-1],)]


def validation_order(
    run: RunConfig, streams: Sequence[str], store: ImageStore, indices: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], Sequence[str]]]:
    """Batches of all subjects that hold a stream, in order, and the streams that they show: all, or one after another
    where a batch of the run has one."""
    stored = [name for name in streams if name in store.rows]
    for names in [stored] if run.objective.streams_per_batch == "all" else [[name] for name in stored]:
        holders = store.holders(indices, names)
        for start in range(0, len(holders), run.train.batch_size):
            yield holders[start : start + run.train.batch_size], names


def stream_turns(
    streams: Sequence[str], store: ImageStore, indices: NDArray[np.int64], *, pairs: bool
) -> dict[tuple[str, ...], NDArray[np.int64]]:
    """Single streams, and pairs of streams where wanted -> the subjects that hold them; those with two or more."""
    by_stream = {name: np.intersect1d(indices, store.rows[name]) for name in streams if name in store.rows}
    turns: dict[tuple[str, ...], NDArray[np.int64]] = {(name,): holders for name, holders in by_stream.items()}
    if pairs:
        both = itertools.combinations(by_stream, 2)
        turns |= {(first, second): np.intersect1d(by_stream[first], by_stream[second]) for first, second in both}
    if not any(len(holders) > 1 for holders in turns.values()):
        raise DataError("train: no two subjects hold the same stream, expected some to compare")
    return {turn: holders for turn, holders in turns.items() if len(holders) > 1}


def batches(indices: NDArray[np.int64], size: int, generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Endless shuffled batches: passes over the subjects, each in a new order; a rest smaller than a batch is left for
    another pass."""
    while True:
        order = generator.permutation(indices)
        for start in range(0, max(len(order) - size, 0) + 1, size):
            yield order[start : start + size]
