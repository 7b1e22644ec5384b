"""Rounds of one run at one site; images, model and private state stay in memory between them.

The files on disk decide. The state in memory is used only if it is that of the file of the round before; otherwise the
file is loaded. So a site that was killed, or that another process served in between, goes on with the same bits.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panfm.config import RunConfig, description_hash, dump_toml, parse_run
from panfm.data.store import ImageStore
from panfm.errors import ProtocolError
from panfm.models.packing import frozen_manifest, trained_manifest
from panfm.privacy.guarantees import privacy_label
from panfm.sharing.coding import Arrays, digests, encode_with_feedback, take_step
from panfm.sharing.groups import Flat, GroupManifest
from panfm.sharing.messages import RoundTask
from panfm.sharing.release import RoundResult
from panfm.sharing.weights import GroupWeights, Trained, Weights
from panfm.site.admission import check_finite, check_frozen, check_start
from panfm.site.floors import Floors
from panfm.site.state import Origin, StateStore, fingerprint, note_question, question_digest
from panfm.training.gradient import TrainResult
from panfm.training.trainer import Trainer

if TYPE_CHECKING:
    from panfm.site.patient_budget import PatientBudget

_LOST = "coding.lost."
_GLOBAL = "global."
"""Prefixes, in the private state: what the coding of a group's last update lost, and the global parameters that the
round started from, which a coded step leads on from."""

logger = logging.getLogger(__name__)

Monitors = Callable[["Session", RoundTask, TrainResult, StateStore], dict[str, float]]
"""Computes the monitors of a round that has been trained."""


class Session:
    """Trains rounds of one run on one store."""

    def __init__(
        self,
        site: str,
        run: RunConfig,
        store: ImageStore,
        floors: Floors,
        budget: "PatientBudget | None" = None,
        monitors: "Monitors | None" = None,
        *,
        workers: int = 0,
        make_trainer: Callable[[RunConfig, tuple[str, ...]], Trainer] = Trainer,
    ) -> None:
        """Build the model.

        Args:
            floors: What the site asks of a round before its result leaves.
            budget: Pays for the rounds of a private run.
            monitors: Computes the monitors of rounds of a run that is not private.
            workers: Threads that prepare batches ahead of their steps.
        """
        self.site = site
        self.run = run
        self.budget = budget
        self.store = store
        self.floors = floors
        self._monitors = None if run.patient_dp or run.site_dp else monitors
        self.workers = workers
        self.origin = Origin(description_hash(run), privacy_label(run), fingerprint(store))
        self.streams = trained_streams(run.streams, store)
        self.trained = tuple(run.streams) if run.sharing.rule == "plain" else tuple(self.streams)
        self._description = dump_toml(run)
        self.trainer = _trainers(self._description, make_trainer)(self.trained)
        self.manifest = trained_manifest(self.trainer.model, run.sharing)
        self.frozen = frozen_manifest(self.trainer.model, run.sharing)
        self._group_weights = GroupWeights(run.sharing, run.train, run.site_dp, self.manifest)
        self._mine = object()
        """Marks what this session has put into the trainer."""
        self._lost: dict[str, Flat] = {}
        self._global: Mapping[str, Flat] = {}
        """Global parameters that the last round started from."""

    def train_round(self, task: RoundTask, states: StateStore) -> RoundResult:
        """Train from the private state of the round before, keep the new one, and return updates and statistics.

        Raises:
            ProtocolError: the task's groups do not fit this site's model, are not finite, are a step from parameters
                that it lacks or not where the run starts, or the round was asked otherwise before.
            LimitError: too few steps counted.
            DataError: the private state on disk is corrupted, or comes from another experiment or other patients.
            BudgetError, LedgerError: the run is private, and the site cannot pay for the round.
        """
        torch.set_num_threads(self.run.train.threads)
        self.load_frozen(task, states)
        state_round = self.load_private(task.round_number, states)
        self.load_global(task, state_round)
        digest = question_digest(self._description, task, self._global, states.digest(state_round))
        note_question(states, self.run.train.rounds, task.round_number, digest)
        if self.budget:
            from panfm.site.kept_reply import keep_reply, kept_reply, reply_key  # only private runs need it

            if repeat := kept_reply(states, key := reply_key(task, digest, self.origin.patients)):
                self.budget.check_paid(self.run, task)
                return repeat
        result = self._train(task)
        updates = self._updates(self.floors.withheld(self.manifest, result))
        self.trainer.holds = (self._mine, states.save(task.round_number, self._private_state()))
        quiet = self.run.patient_dp or self.run.site_dp
        released = RoundResult(
            state_round=state_round,
            updates=updates,
            weights=self._weights(result),
            loss=None if quiet else result.loss,
            validation_loss=None if quiet else self._validation_loss(task.round_number),
            num_skipped=None if quiet else result.num_skipped,
            saliency={} if self.run.site_dp else self._saliency(result),
            monitors=self._monitors(self, task, result, states) if self._monitors else {},
        )
        if self.budget:
            keep_reply(states, task, key, released)
        return released

    def _train(self, task: RoundTask) -> TrainResult:
        train, indices = self.run.train, self.store.indices("train")
        first_step = (task.round_number - 1) * train.local_steps
        steps: dict[str, Any] = {
            "first_step": first_step,
            "num_steps": train.local_steps,
            "profile": dict(task.profile) if task.profile else None,
        }
        if self.run.patient_dp:
            assert self.budget is not None
            from panfm.privacy.private_step import train_privately  # a site without private runs does without

            permit = self.budget.pay(self.run, task, self.origin.patients)
            return train_privately(self.trainer, self.store, indices, permit=permit, **steps)
        steps |= {"site": self.site, "round_number": task.round_number, "workers": self.workers}
        steps["with_monitors"] = self._monitors is not None
        result = self.trainer.train(self.store, indices, **steps)
        self.floors.check_round(train, first_step, result)
        return result

    def load_frozen(self, task: RoundTask, states: StateStore) -> None:
        """Put the parameters that the run does not train in place: those that came, or else those kept.

        Raises:
            ProtocolError: they are not the run's, are of other parts of the model, not finite, or not there.
        """
        if not task.frozen and self.trainer.has_frozen:
            return
        groups = task.frozen or states.load_frozen()
        if groups is None:
            raise ProtocolError(f"round {task.round_number}: this site lacks the parameters that are not trained")
        tensors = _tensors(self.frozen, groups)
        check_finite(task.round_number, groups, {}, None)
        check_frozen(self.run, self.trained, task.round_number, groups)
        if task.frozen:
            states.save_frozen(groups)
        self.trainer.load_frozen(tensors)

    def load_global(self, task: RoundTask, state_round: int) -> None:
        """Start from the server's parameters; without private state, afresh.

        Raises:
            ProtocolError: they do not fit this site's model, are not finite, or not where the run starts.
        """
        groups = self._arrived(task, state_round) if task.digests else task.groups
        check_finite(task.round_number, groups, task.teacher, task.profile)
        tensors = _tensors(self.manifest, groups)
        if task.round_number == 1:
            for parameters in (groups, task.teacher):
                check_start(self.run, self.trained, parameters)
        self.trainer.load_shared(tensors)
        self._global = groups
        if state_round == 0:
            self.trainer.reset_private()
            self._lost = {}
        if self.run.train.teacher_start == "global":
            self.trainer.restart_teacher()
        elif self.run.train.teacher_start == "server-ema":
            self.trainer.load_teacher(_tensors(self.manifest, task.teacher))

    def _arrived(self, task: RoundTask, state_round: int) -> dict[str, Flat]:
        """The global parameters that a step leads to. Raises ProtocolError if they are not the server's."""
        if state_round == task.round_number - 1 and self._global:
            groups = take_step(self.run.sharing.coding, self.manifest, self._global, task.groups)
            if digests(groups) == task.digests:
                return groups
        raise ProtocolError(
            f"round {task.round_number}: the step does not lead from this site's parameters to the server's"
        )

    def load_private(self, round_number: int, states: StateStore) -> int:
        """Load the private state of the round before; returns its round, 0 for a fresh one. Raises DataError as
        `train_round` does."""
        in_memory, self.trainer.holds = self.trainer.holds, None
        states.check_origin()
        before = states.round_before(round_number)
        if before < round_number - 1:
            source = f"that of round {before}" if before else "a fresh one"
            logger.warning("round %s: private state of the round before is missing, using %s", round_number, source)
        if before and in_memory != (self._mine, states.digest(before)):
            state = states.load(before)
            self.trainer.load_private(state)
            self._lost, self._global = _under(state, _LOST), _under(state, _GLOBAL)
        return before

    def _weights(self, result: TrainResult) -> dict[str, Weights]:
        """Weights of the groups; none of streams and pooled experts that too few subjects stand behind."""
        num_steps = result.num_steps - result.num_skipped
        thin = self.floors.thin_streams(result)
        subjects_per_stream = {name: count for name, count in result.subjects_per_stream.items() if name not in thin}
        trained = Trained(result.subjects, subjects_per_stream, num_steps, self.floors.gate_mass(result))
        return {group: self._group_weights.weights(group, trained) for group in self.manifest.groups}

    def _saliency(self, result: TrainResult) -> dict[str, float]:
        """Saliency of the streams that enough subjects of the last batch hold."""
        thin = self.floors.streams_below(self.store, result.batches[-1:])
        return {stream: value for stream, value in result.saliency.items() if stream not in thin}

    def _updates(self, withheld: Mapping[str, NDArray[np.bool_]]) -> Arrays:
        """Code the updates of a round; rounding errors are kept for the next round.

        Args:
            withheld: Group -> which of its numbers travel as 0; what their coding lost before is kept as it is.
        """
        state = self.trainer.model.travelling_state(self.run.sharing)
        local = {name: value.cpu().numpy() for name, value in state.items()}
        updates = {group: self.manifest.pack(group, local, minus=self._global[group]) for group in self.manifest.groups}
        updates, owed = _without(updates, withheld), _without(self._lost, withheld)
        coded, lost = encode_with_feedback(self.run.sharing.coding, self.manifest, updates, owed)
        kept = {
            group: np.where(withheld[group], before, lost[group])
            for group, before in self._lost.items()
            if group in withheld
        }
        self._lost = lost | kept
        return coded

    def _private_state(self) -> dict[str, Tensor]:
        kept = {_LOST + group: numbers for group, numbers in self._lost.items()}
        if self.run.sharing.coding != "float32":
            kept |= {_GLOBAL + group: parameters for group, parameters in self._global.items()}
        return self.trainer.private_state() | {name: torch.from_numpy(array) for name, array in kept.items()}

    def validates(self, round_number: int) -> bool:
        """Whether the val split is looked at after a round."""
        return round_number % self.run.train.validate_every == 0 or round_number == self.run.train.rounds

    def _validation_loss(self, round_number: int) -> float | None:
        """Loss on the val split; None in rounds between validations, and if it is of too few subjects."""
        indices = self.store.indices("val")
        if not self.validates(round_number) or len(indices) < self.floors.batch:
            return None
        validation = self.trainer.validate(self.store, indices, site=self.site)
        return validation.loss if self.floors.is_enough(validation.subjects) else None


def _tensors(manifest: GroupManifest, groups: Mapping[str, Flat]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in manifest.unpack_all(groups).items()}


def _without(groups: Mapping[str, Flat], withheld: Mapping[str, NDArray[np.bool_]]) -> dict[str, Flat]:
    """Packed groups with 0 for the withheld numbers."""
    return {
        group: np.where(withheld[group], np.float32(0.0), numbers) if group in withheld else numbers
        for group, numbers in groups.items()
    }


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Flat]:
    return {name.removeprefix(prefix): value.numpy() for name, value in state.items() if name.startswith(prefix)}


@lru_cache(maxsize=1)
def _trainers(
    run_toml: str, make: Callable[[RunConfig, tuple[str, ...]], Trainer]
) -> Callable[[tuple[str, ...]], Trainer]:
    """A run's trainers by the streams that they train; those of the run before are let go.

    Sites of one process that train the same streams of a run take turns at one trainer: a round loads all of it that is
    not in place, and building one takes as long as two steps.
    """
    return lru_cache(maxsize=32)(partial(make, parse_run(run_toml)))


def trained_streams(streams: Iterable[str], store: ImageStore) -> dict[str, int]:
    """Count the training subjects of each of a run's streams; streams that no training subject holds are left out."""
    counts = {stream: store.num_holding(stream, "train") for stream in streams if stream in store.images}
    return {stream: count for stream, count in counts.items() if count}
