"""Audit by membership inference: tells from the losses of a finished model who was in its training set.

    score   mean over masks of (loss of the patient under the model before - under the model after)

Training lowers the loss of its own patients by more than that of others, so the score orders members before others:
an AUC of 0.5 says that this attack, which needs no more than the two models, finds nothing. The masks are the same for
everybody. Members and others have to be alike, so each site is compared with its own patients that were not trained
on, and the sites' AUCs are averaged by their pairs.

Source: Yeom et al. 2018 for the loss, Watson et al. 2022 for calibrating it by a model that has not seen the patient.
Shape legend: N patients, M masks, R resamples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panfm.config import RunConfig
from panfm.data.store import ImageStore
from panfm.errors import DataError
from panfm.evaluate.result import Interval
from panfm.evaluate.scores import auc, draw_counts, interval
from panfm.seeds import torch_generator
from panfm.training.trainer import Trainer

_CHUNK = 64


@dataclass(frozen=True)
class Place:
    """A site's patients: those that a model was trained on, and others like them."""

    store: ImageStore
    members: NDArray[np.int64]
    others: NDArray[np.int64]

    @classmethod
    def of(cls, store: ImageStore) -> "Place":
        """Divide a site's patients into the train split and the others."""
        members = store.indices("train")
        return cls(store, members, np.setdiff1d(np.arange(len(store.subjects)), members))


@dataclass(frozen=True)
class Membership:
    """Result of the attack."""

    auc: Interval
    """Chance that a member scores above another patient of its site; 0.5 is none."""
    members: int
    others: int


def audit_membership(
    run: RunConfig,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    places: Sequence[Place],
    *,
    masks: int = 8,
    bootstrap: int = 1000,
) -> Membership:
    """Attack a model.

    Args:
        run: Of the model; its objective and share of hidden tokens are used, without running statistics.
        before, after: States of the model that training started from and ended with.
        masks: Over which the loss is averaged.
        bootstrap: Resamples of the patients for the 95 % interval.
    Raises:
        DataError: no site has both members and others that hold a stream of the model.
    """
    total, pairs, members, others = np.zeros(1 + bootstrap), 0, 0, 0
    for number, place in enumerate(places):
        everyone = np.concatenate([place.members, place.others])
        is_member = np.arange(len(everyone)) < len(place.members)
        scores = patient_losses(run, before, place.store, everyone, masks=masks)
        scores -= patient_losses(run, after, place.store, everyone, masks=masks)
        known = np.isfinite(scores)
        inside, outside = int((known & is_member).sum()), int((known & ~is_member).sum())
        if inside and outside:
            counts = _resamples(is_member[known], bootstrap, run.seed + number)
            total += inside * outside * auc(scores[known], is_member[known], counts)
            pairs, members, others = pairs + inside * outside, members + inside, others + outside
    if not pairs:
        raise DataError("membership: no site has patients in train and in another split, both are needed")
    return Membership(interval((total / pairs)[:, None]), members, others)


@torch.no_grad()
def patient_losses(
    run: RunConfig, state: Mapping[str, Tensor], store: ImageStore, indices: NDArray[np.int64], *, masks: int
) -> NDArray[np.float64]:
    """Loss of each patient [N], mean over masks; NaN for patients without a stream of the run."""
    trainer = _trainer(run, state, [stream for stream in run.streams if stream in store.images])
    features, position = trainer.patch_features(store), {int(index): at for at, index in enumerate(indices)}
    losses = np.full((masks, len(indices)), np.nan)
    for mask in range(masks):
        for number, chunk in enumerate(_chunks_of_equals(features, indices, trainer.model.stream_names, _CHUNK)):
            generator = torch_generator(run.seed, "membership", mask, number)
            _, of_chunk = trainer.unguided_losses(features.batch(chunk).to(trainer.device), generator)
            losses[mask, [position[int(index)] for index in chunk]] = of_chunk.double().cpu().numpy()
    means: NDArray[np.float64] = losses.mean(axis=0)
    return means


def _chunks_of_equals(
    store: ImageStore, indices: NDArray[np.int64], streams: Sequence[str], size: int
) -> Iterator[NDArray[np.int64]]:
    """Chunks of at most `size` subjects that hold the same of the streams; who holds none is left out."""
    has_stream = np.zeros((len(indices), len(streams)), dtype=bool)
    for column, stream in enumerate(streams):
        has_stream[:, column] = np.isin(indices, store.rows.get(stream, []))
    for kind in np.unique(has_stream, axis=0):
        equals = indices[(has_stream == kind).all(axis=1)]
        for start in range(0, len(equals) if kind.any() else 0, size):
            yield equals[start : start + size]


def _trainer(run: RunConfig, state: Mapping[str, Tensor], streams: Sequence[str]) -> Trainer:
    """A trainer at a state, its teacher at the same; nothing in it couples patients."""
    objective = run.objective.without_running_statistics()
    masking = run.masking.model_copy(update={"policy": "random"})
    trainer = Trainer(run.model_copy(update={"objective": objective, "masking": masking}), streams)
    trainer.model.load_state_dict({name: state[name] for name in trainer.model.state_dict()})
    trainer.restart_teacher()
    return trainer


def _resamples(is_member: NDArray[np.bool_], number: int, seed: int) -> NDArray[np.float64]:
    """Counts [1 + R, N]: members and others are drawn apart, so that their numbers stay."""
    counts = np.empty((1 + number, len(is_member)))
    for value in (True, False):
        counts[:, is_member == value] = draw_counts(int((is_member == value).sum()), number, seed)
    return counts
