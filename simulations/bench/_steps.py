"""Clocks, and single training steps of several arms that take turns in one process on one batch of noise."""

import time
from collections.abc import Callable, Mapping

import numpy as np

from panfm.config import StreamConfig
from panfm.data.store import ImageStore
from panfm.seeds import numpy_generator
from panfm.training.trainer import Trainer


def in_turns(arms: Mapping[str, Callable[[int], float]], turns: int) -> dict[str, list[float]]:
    """Values that every arm returns for turns 1, 2, ...; turn 0 warms up, and each turn begins with another arm."""
    measured: dict[str, list[float]] = {arm: [] for arm in arms}
    order = list(arms)
    for turn in range(turns + 1):
        first = turn % len(order)
        for arm in order[first:] + order[:first]:
            value = arms[arm](turn)
            if turn:
                measured[arm].append(value)
    return measured


def step_seconds(
    trainer: Trainer, store: ImageStore, turn: int = 0, *, at_end: Callable[[], None] = lambda: None
) -> float:
    """CPU seconds of one training step on all subjects, without what a round does once at its end, before which
    `at_end` is called."""
    ended: list[float] = []

    def note(*_: object) -> None:
        ended.append(time.process_time())
        at_end()

    begin = time.process_time()
    trainer.train(
        store,
        np.arange(len(store.subjects)),
        first_step=turn,
        num_steps=1,
        site="bench",
        round_number=turn,
        on_step=note,
    )
    return ended[0] - begin


def noise_store(streams: Mapping[str, StreamConfig], seed: int, num_subjects: int, purpose: str) -> ImageStore:
    """Complete subjects whose images are noise: the cost of a step does not depend on their content."""
    random = numpy_generator(seed, purpose)
    images = {
        name: random.random((num_subjects, stream.channels, *stream.shape), dtype=np.float32)
        for name, stream in streams.items()
    }
    subjects = tuple(str(index) for index in range(num_subjects))
    return ImageStore(subjects, ("train",) * num_subjects, images, {name: np.arange(num_subjects) for name in images})


class Clock:
    """Seconds, on the clock and of the CPU, since it was made."""

    def __init__(self) -> None:
        self._begin, self._begin_cpu = time.perf_counter(), time.process_time()

    def seconds(self, share: int = 1) -> dict[str, float]:
        """Seconds so far, over the number of sites that share them."""
        seconds, cpu_seconds = time.perf_counter() - self._begin, time.process_time() - self._begin_cpu
        return {"seconds": seconds / share, "cpu_seconds": cpu_seconds / share}
