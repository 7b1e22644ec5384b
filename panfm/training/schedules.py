"""Schedules over the whole run: local step k of n stands at progress (k + 1/2) / n, from round 1 to the last.

A site never restarts a schedule: progress follows from the round number, so that a site that missed rounds, or was
restarted, stands where the others stand.
"""

import math

from panfm.config.training import TrainConfig


def progress_of(train: TrainConfig, step: int) -> float:
    """Share of the run, in [0, 1], at the middle of a local step, counted from the start of the run."""
    return (step + 0.5) / train.total_steps


def learning_rate(train: TrainConfig, progress: float) -> float:
    """Learning rate at a point of the run."""
    return train.learning_rate * warmup_cosine(progress, warmup=train.warmup)


def warmup_cosine(progress: float, *, warmup: float) -> float:
    """Factor in [0, 1]: linear from 0 over the first `warmup` share of the run, then cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return cosine(progress, start=1.0, end=0.0, begin=warmup)


def cosine(progress: float, *, start: float, end: float, begin: float = 0.0) -> float:
    """Value that goes from `start` at `begin` to `end` at 1 by half a cosine; constant before `begin`."""
    share = min(max((progress - begin) / max(1.0 - begin, 1e-12), 0.0), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))
