"""How few patients and steps a site lets stand behind what leaves it, where no noise of its own measure hides them.

An update of one step on one patient is that patient's gradient, and images come back from it (`panfm audit inversion`).
`limits.smallest-batch` and `limits.smallest-steps` rule that out for what a run says and for what its rounds really
do: streams that few patients have, steps that were left out, steps that the schedule or a pull makes count for nothing.
They do not stop a server that chooses parameters under which a part of the model answers to one patient only.

    w_k = lr_k  prod_(j >= k) |1 - lr_j mu|  prod_(j > k) |1 - lr_j decay|

is how much of local step k is left in a round's update: lr_j learning rate, mu `train.proximal-mu`, decay
`train.weight-decay`. max w <= 3 / smallest-steps sum w: warm-up and cosine alone stay within that.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from panfm.config import RunConfig
from panfm.config.privacy import NO_CLAIM, claim
from panfm.config.run import TrainConfig
from panfm.config.site import LimitsConfig
from panfm.data.store import ImageStore
from panfm.errors import LimitError
from panfm.objectives import TrainResult
from panfm.objectives.schedules import warmup_cosine

_UNEVEN = 3.0
"""How much more than an even share a step may be of an update; half a cosine's end is three times as steep."""


@dataclass(frozen=True)
class Floors:
    """Fewest patients and local steps behind what leaves; 1 is no floor."""

    batch: int
    steps: int

    @classmethod
    def of(cls, run: RunConfig, limits: LimitsConfig) -> "Floors":
        """Those of a run's rounds; ones where patients' own noise and clipping stand in their place, since what is
        refused or left out by the data would tell of it."""
        return cls(limits.smallest_batch, limits.smallest_steps) if run.privacy is None else cls(1, 1)

    def check_subjects(self, store: ImageStore, streams: Sequence[str]) -> None:
        """Raises LimitError if no batch of the train split can be large enough.

        Args:
            streams: Those that enough subjects hold.
        """
        if (found := len(store.indices("train"))) < self.batch:
            rule = f"training subjects, expected at least limits.smallest-batch ({self.batch})"
            raise LimitError(f"{found} {rule}", public=f"too few {rule}")
        if not streams:
            raise LimitError.of_question(
                f"no stream of this run has limits.smallest-batch ({self.batch}) training subjects"
            )

    def check_round(self, train: TrainConfig, first_step: int, result: TrainResult) -> None:
        """Raises LimitError if too few steps counted, or one of them makes too much of the update. A round in which
        none counted has changed nothing."""
        if 0 < (found := len(result.counted)) < self.steps:
            rule = f"steps counted, expected at least limits.smallest-steps ({self.steps})"
            raise LimitError(f"{found} {rule}", public=f"too few {rule}")
        for decay in (0.0, train.weight_decay):  # vectors do not decay
            weights = step_weights(train, [first_step + step for step in result.counted], decay)
            if weights and not _UNEVEN * sum(weights) >= self.steps * max(weights):
                raise LimitError.of_question(
                    f"train: one step makes most of the update, expected at most {_UNEVEN:g} of "
                    f"limits.smallest-steps ({self.steps})"
                )

    def streams_below(self, store: ImageStore, batches: Iterable[Sequence[int] | NDArray[np.int64]]) -> set[str]:
        """Streams that too few subjects of these batches hold."""
        if self.batch == 1:
            return set()
        subjects = [subject for batch in batches for subject in batch]
        return {name for name, rows in store.rows.items() if np.isin(rows, subjects).sum() < self.batch}


def check_run(run: RunConfig, limits: LimitsConfig) -> None:
    """Raises LimitError if a run asks for smaller batches or fewer steps than the site allows.

    A run whose epsilon the site itself bounds is free of both. One whose epsilon is the server's choice is not; its
    batches are Poisson samples, of the sample rate times the public number of patients. A run with noise and without a
    claim is refused where there is a floor: noise next to nothing on a sample of one patient would be a way round it.
    """
    batch, key = run.train.batch_size, "train.batch-size"
    if run.privacy is not None:
        if limits.epsilon is not None:
            return
        if claim(run) == NO_CLAIM and limits.smallest_batch > 1:
            raise LimitError.of_question(
                "privacy: this run has noise but makes no claim, and a step of it may be one patient's; expected a "
                f"claim, or no [privacy] and batches of at least limits.smallest-batch ({limits.smallest_batch})"
            )
        batch, key = math.ceil(run.privacy.sample_rate * run.privacy.public_subjects), "sample-rate x public-subjects"
    if batch < limits.smallest_batch:
        raise LimitError.of_question(
            f"{key} is {batch}, expected at least limits.smallest-batch ({limits.smallest_batch})"
        )
    if run.train.local_steps < limits.smallest_steps:
        raise LimitError.of_question(
            f"train.local-steps is {run.train.local_steps}, expected at least "
            f"limits.smallest-steps ({limits.smallest_steps})"
        )


def step_weights(train: TrainConfig, steps: Sequence[int], decay: float) -> list[float]:
    """How much of each local step is left in the update, last step first.

    Args:
        steps: Steps of the run that one round took.
    """
    weights, left = [], 1.0
    for step in reversed(steps):
        rate = train.learning_rate * warmup_cosine((step + 0.5) / train.total_steps, warmup=train.warmup)
        left *= abs(1.0 - rate * train.proximal_mu)
        weights.append(rate * left)
        left *= abs(1.0 - rate * decay)
    return weights
