"""A site's monitors of a round: what its last batch tells of the features, what they say only of organs present, and a
probe of its own labels.

Loaded only where the operator lets monitors leave. The last two are of the model that the site has just trained, in the
rounds that validate. `presence-leakage` is the share of the variance of features that tells only which organs are
present (panfm/evaluate/leakage.py), of the first 16 patients of the val split who have all organs of the site, or as
many as the operator asks for at least. The probe, `validation-auc`, needs more of the operator:
`evaluation` in `limits.may-leave`, and the columns in `limits.evaluation-labels`. It is the mean AUC, over the run's
yes/no labels that the site has, of a ridge regression fitted on training patients and scored on the val split, both
read by the model that the site has just trained. It is computed in the rounds that validate, for `limits.evaluations`
models at most.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from panfm.config import Releasable, SiteConfig, dump_toml
from panfm.data.store import Batch
from panfm.errors import DataError, LimitError
from panfm.evaluate.embed import embed_store
from panfm.evaluate.label_sums import MAX_FEATURES, Floats
from panfm.evaluate.leakage import complete_patients, organs_present, presence_variance
from panfm.evaluate.site_score import enough_of, probed, scored
from panfm.models import PanModel, describe_model
from panfm.sharing.messages import RoundTask
from panfm.site.asked_model import embed_patients
from panfm.site.evaluation_answer import note_evaluated
from panfm.site.session import Session
from panfm.site.state import StateStore, question_digest
from panfm.site.sums_answer import read_targets
from panfm.training.gradient import TrainResult
from panfm.training.monitors import expert_monitors

_MOST_TRAINING = 512
"""Training patients that the probe is fitted on: the first ones that have all of its labels."""

_MOST_PATIENTS = 16
"""Patients of `presence-leakage`: each is embedded from up to 16 sets of organs, so more of them would cost a round
several percent."""

logger = logging.getLogger(__name__)


class RoundMonitors:
    """Computes the monitors of a site's rounds; they draw and change nothing of the training."""

    def __init__(self, folder: Path, site: SiteConfig) -> None:
        self._folder, self._site = folder, site

    def after(self, session: Session, task: RoundTask, result: TrainResult, states: StateStore) -> dict[str, float]:
        """Monitors of the round that a session has just trained; none of what too few subjects stand behind."""
        told: dict[str, float] = {}
        if session.floors.is_enough(len(set(*result.batches[-1:]))):
            told |= result.monitors | expert_monitors(session.floors.gate_mass(result))
        if session.validates(task.round_number):
            told |= _presence_leakage(session)
            try:
                told |= self._validation_auc(session, task, states)
            except DataError as error:
                logger.warning("round %s: no validation-auc (%s)", task.round_number, error)
        return told

    def _validation_auc(self, session: Session, task: RoundTask, states: StateStore) -> dict[str, float]:
        """Mean AUC of the probe; empty where no label may be used, has enough patients, or was asked of too often.

        Raises:
            DataError: the label table or the note of evaluations is faulty.
        """
        at = np.concatenate([session.store.indices(split) for split in ("train", "val")])
        labels = self._labels(session, at)
        if not labels or describe_model(session.run).embedding_size > MAX_FEATURES:
            return {}
        targets = np.stack(list(labels.values()), axis=1)
        known: NDArray[np.bool_] = np.asarray(np.isfinite(targets).all(axis=1))
        train, val = (np.flatnonzero(known & np.isin(at, session.store.indices(split))) for split in ("train", "val"))
        train = train[:_MOST_TRAINING]
        floor = session.floors.batch
        kept: NDArray[np.bool_] = np.asarray(enough_of(targets[train], floor) & enough_of(targets[val], floor))
        if not kept.any():
            return {}
        used = np.concatenate([train, val])
        targets = targets[used][:, kept]
        names = ", ".join(name for name, is_kept in zip(labels, kept, strict=True) if is_kept)
        question = question_digest(dump_toml(session.run), task, task.groups, states.digest(task.round_number))
        limits, state_dir = self._site.limits, states.folder.parents[1]
        try:
            note_evaluated(state_dir, session, question, f"validation {names}", at[used], targets, limits)
        except LimitError as error:
            logger.info("round %s: no validation-auc (%s)", task.round_number, error)
            return {}
        features = embed_patients(session, at[used])
        if not np.isfinite(features).all():
            return {}
        predicted = probed(features, targets, np.arange(len(train)))[len(train) :]
        score = scored(predicted, targets[len(train) :], is_number=False, is_held_out=True)
        return {"validation-auc": score.value} if np.isfinite(score.value) else {}

    def _labels(self, session: Session, at: NDArray[np.int64]) -> dict[str, Floats]:
        """Values of the run's yes/no labels that the operator lets be evaluated and that somebody has, by name; NaN
        where unknown."""
        limits, tasks = self._site.limits, session.run.probe.tasks
        if Releasable.EVALUATION not in limits.may_leave:
            return {}
        named, open_to = {name for names in tasks.values() for name in names}, limits.evaluation_labels
        asked = {name: (name,) for name in sorted(named) if open_to == "all" or name in open_to}
        values = read_targets(self._folder, self._site, session.store, asked, at) if asked else {}
        known = {name: of[np.isfinite(of)] for name, of in values.items()}
        return {
            name: of[:, 0] for name, of in values.items() if len(known[name]) and np.isin(known[name], (0, 1)).all()
        }


def _presence_leakage(session: Session) -> dict[str, float]:
    """Share of the variance; empty at a site of one organ, or if too few patients stand behind it."""
    store, seed = session.trainer.patch_features(session.store), session.run.seed
    streams = [name for name in session.streams if name in store.rows]
    patients = complete_patients(store, streams, store.indices("val"))[: max(_MOST_PATIENTS, session.floors.batch)]
    _, parts = organs_present(streams, seed)
    if len(patients) < 2 or not session.floors.is_enough(len(patients)) or not parts:
        return {}
    reader = _PatchReader(session.trainer.model)
    features = np.stack([embed_store(reader, store, patients, names, batch_size=len(patients)) for names in parts])
    share = float(presence_variance(features, np.ones((1, len(patients))))[0])
    return {"presence-leakage": share} if np.isfinite(share) else {}


@dataclass(frozen=True)
class _PatchReader:
    """Embeds batches of patch features, which a session keeps."""

    model: PanModel

    def eval(self) -> object:
        """Go to inference mode."""
        return self.model.eval()

    def embed(self, batch: Batch) -> Tensor:
        """Features [B, D]."""
        return self.model.embed_patches(batch.to(self.model.stream_of_patch.device))
