"""Floors: the fewest patients and local steps that must stand behind an update, where no noise of the site hides them.

An update of one step on one patient is that patient's gradient, and images come back from it (`panfm audit inversion`).
`limits.smallest-batch` and `limits.smallest-steps` rule that out for what a run says and for what its rounds really
do: patients without a loss, streams that few patients have, shared experts that few go through, steps that were left
out, steps that the schedule or a pull makes count for nothing.
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

from panfm.config.patient_dp import PatientDpConfig
from panfm.config.site_description import LimitsConfig
from panfm.config.training import TrainConfig
from panfm.data.store import ImageStore
from panfm.errors import LimitError
from panfm.sharing.groups import DIRECTOR, EXPERTS, ROUTER, GroupManifest, layer_of, stream_of
from panfm.training.gradient import TrainResult
from panfm.training.schedules import learning_rate, progress_of

_UNEVEN = 3.0
"""How much more than an even share a step may be of an update; half a cosine's end is three times as steep."""


@dataclass(frozen=True)
class Floors:
    """Fewest patients and local steps behind a reply; 1 is no floor."""

    batch: int
    steps: int

    @classmethod
    def of(cls, limits: LimitsConfig, patient_dp: PatientDpConfig | None) -> "Floors":
        """Return the floors of a run's rounds; 1 in a private run, where clipping and noise protect patients instead,
        and a round that is refused for its data would tell about them. `admission.check_floors` refuses private
        runs that the site's own epsilon does not cover."""
        return cls(limits.smallest_batch, limits.smallest_steps) if patient_dp is None else cls(1, 1)

    def check_subjects(self, store: ImageStore, streams: Sequence[str]) -> None:
        """Raises LimitError if no batch of the train split can be large enough.

        Args:
            streams: Those that enough subjects hold.
        """
        if (subjects := len(store.indices("train"))) < self.batch:
            rule = f"training subjects, expected at least limits.smallest-batch ({self.batch})"
            raise LimitError(f"{subjects} {rule}", public=f"too few {rule}")
        if not streams:
            raise LimitError.of_question(
                f"no stream of this run has limits.smallest-batch ({self.batch}) training subjects"
            )

    def check_round(self, train: TrainConfig, first_step: int, result: TrainResult) -> None:
        """Raises LimitError if too few steps counted, too few subjects had a loss in one of them, or one of them makes
        too much of the update. A round in which none counted has changed nothing."""
        if 0 < (counted := len(result.counted)) < self.steps:
            rule = f"steps counted, expected at least limits.smallest-steps ({self.steps})"
            raise LimitError(f"{counted} {rule}", public=f"too few {rule}")
        fewest = min((len(result.batches[step]) for step in result.counted), default=self.batch)
        if not self.is_enough(fewest):
            rule = f"subjects of a step have anything to guess, expected at least limits.smallest-batch ({self.batch})"
            raise LimitError(f"{fewest} {rule}", public=f"too few {rule}")
        for decay in (0.0, train.weight_decay):  # vectors do not decay
            weights = step_weights(train, [first_step + step for step in result.counted], decay)
            if weights and not _UNEVEN * sum(weights) >= self.steps * max(weights):
                raise LimitError.of_question(
                    f"train: one step makes most of the update, expected at most {_UNEVEN:g} of "
                    f"limits.smallest-steps ({self.steps})"
                )

    def is_enough(self, subjects: int) -> bool:
        """Whether so many subjects may stand behind what leaves; without a floor, none is enough."""
        return self.batch == 1 or subjects >= self.batch

    def thin_streams(self, result: TrainResult) -> set[str]:
        """Streams whose update comes from too few subjects."""
        return {name for name, count in result.contributors_per_stream.items() if not self.is_enough(count)}

    def withheld(self, manifest: GroupManifest, result: TrainResult) -> dict[str, NDArray[np.bool_]]:
        """Which numbers of the packed groups come from too few subjects: group -> bool [size], True for those.

        An expert's and its router row's numbers, where experts are shared. A director is a mean of experts: one that
        is withheld would follow from it and the others, so it is withheld with any that had gate mass.
        """
        if self.batch == 1:
            return {}
        experts, streams = self._thin_experts(result), self.thin_streams(result)
        masks: dict[str, NDArray[np.bool_]] = {}
        for group in manifest.groups:
            if (stream := stream_of(group)) is not None:
                masks[group] = np.full(manifest.size(group), stream in streams)
            elif group in (EXPERTS, ROUTER):
                thin = [experts[layer][index] for layer, index in manifest.experts(group)]
                lengths, places = zip(*manifest.segments(group), strict=True)
                masks[group] = np.repeat(np.array(thin)[list(places)], lengths)
            elif group == DIRECTOR and EXPERTS in manifest.groups:
                used = {layer: thin & (np.array(result.gate_mass[layer]) > 0) for layer, thin in experts.items()}
                shapes = manifest.groups[group]
                masks[group] = np.repeat(
                    [used[layer_of(name)].any() for name, _ in shapes], [math.prod(shape) for _, shape in shapes]
                )
        return {group: mask for group, mask in masks.items() if mask.any()}

    def gate_mass(self, result: TrainResult) -> dict[str, list[float]]:
        """Gate mass per layer and expert, 0 for experts with too few subjects; the others of the layer take theirs
        over in proportion, so that the sum is still the number of images. Without others, all experts alike."""
        masses = dict(result.gate_mass)
        for layer, thin in self._thin_experts(result).items():
            if thin.any():
                mass = np.array(masses[layer])
                kept = np.where(thin, 0.0, mass)
                share = kept / kept.sum() if kept.any() else np.full(len(mass), 1.0 / len(mass))
                masses[layer] = (share * mass.sum()).tolist()
        return masses

    def _thin_experts(self, result: TrainResult) -> dict[str, NDArray[np.bool_]]:
        """Layer -> which of its experts too few subjects went through, bool [R]."""
        return {
            layer: np.array([not self.is_enough(count) for count in counts])
            for layer, counts in result.contributors_per_expert.items()
        }

    def streams_below(self, store: ImageStore, batches: Iterable[Sequence[int] | NDArray[np.int64]]) -> set[str]:
        """Streams that too few subjects of these batches hold."""
        if self.batch == 1:
            return set()
        subjects = np.unique(np.array([subject for batch in batches for subject in batch], dtype=np.int64))
        return {name for name in store.rows if len(store.holders(subjects, [name])) < self.batch}


def step_weights(train: TrainConfig, steps: Sequence[int], decay: float) -> list[float]:
    """Weight that every local step has in the update, last step first.

    Args:
        steps: Steps of the run that one round took.
    """
    weights, left = [], 1.0
    for step in reversed(steps):
        rate = learning_rate(train, progress_of(train, step))
        left *= abs(1.0 - rate * train.proximal_mu)
        weights.append(rate * left)
        left *= abs(1.0 - rate * decay)
    return weights
