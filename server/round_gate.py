"""The gate of a run (`[gate]`): a round whose model is worse by a measure summed over the sites is not kept.

    before round 1     the start is measured: it is the first model that is kept
    after each round   the new global parameters are measured over the same sites
                       not worse: they are kept; else the state before the round comes back

The state that comes back is: global parameters, saliency profile, and the strategy's memory (server optimisers, usual
norms and directions, teacher's average), but for the note which sites have the parameters that are not trained. The
number of the round, and so the schedules, go on; so does what sites keep to themselves: heads, private experts,
teacher, moments. The next round is sent whole parameters, no coded step.

A measure is compared with that of the model that is kept, over the sites that were behind this: what others give is
left out, and without one of them, or with another number of its patients, the round is not kept.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flwr.serverapp import Grid

from panfm.config import RunConfig
from panfm.errors import ProtocolError, RunError
from panfm.evaluate.federated_probe import cross_validated_error
from panfm.sharing.groups import Flat
from panfm.sharing.messages import Handshake
from panfm.sharing.sums_messages import Purpose, SumsReply
from server.checkpoint import Measure, ServerState
from server.exchange import Answers, Watch, ask_sums, label_sums, unwatched
from server.quorum import require_answers

logger = logging.getLogger(__name__)
_MOST_VALIDATION = 10
"""Patients of a val split over those that the site trains on."""
_LARGEST_LOSS = 1e6
Contributions = Mapping[str, Any]
"""Site -> what it gave: sums of each task of labels, or summed loss and number of subjects."""


@dataclass(frozen=True)
class RoundGate:
    """Measures models of a run, and decides which of them is kept."""

    grid: Grid
    run: RunConfig
    """The description that sites get; it has a table `[gate]`."""
    frozen: Mapping[str, Flat]
    embedding_size: int
    at_least: int = 0
    """So many sites must measure a model, unless the others have refused for good."""
    watch: Watch = unwatched

    def start(self, state: ServerState, roster: Mapping[int, Handshake]) -> ServerState:
        """Measure the model that a run starts from.

        Raises:
            RunError: no site gives what the measure needs.
            NoQuorumError: too few answer.
        """
        contributions, answers = self._ask(state, roster)
        require_answers(answers, self.at_least, "gate")
        value = self._value(contributions)
        if not math.isfinite(value):
            reasons = "; ".join(f"{site}: {reason}" for site, reason in answers.failed.items()) or "no label varies"
            raise RunError(f"gate.measure: no site's patients measure the start: {reasons}")
        measure = Measure(value, state.round_number, {site: _patients(given) for site, given in contributions.items()})
        return replace(self._with_holders(state, answers), measure=measure)

    def decide(
        self, before: ServerState, after: ServerState, roster: Mapping[int, Handshake]
    ) -> tuple[ServerState, dict[str, Any]]:
        """Return the state to go on from after a round, and what rounds.jsonl tells of it.

        Args:
            before: State before the round, with the measure of its model.
            after: State after it.
        Raises:
            NoQuorumError: too few answer.
        """
        kept = before.measure
        assert kept is not None
        contributions, answers = self._ask(after, roster)
        require_answers(answers, self.at_least, f"gate after round {after.round_number}")
        contributions = {site: given for site, given in contributions.items() if site in kept.patients}
        missing = [site for site, patients in kept.patients.items() if _of(contributions, site) != patients]
        value = math.nan if missing else self._value(contributions)
        is_kept = value <= kept.value
        line: dict[str, Any] = {
            "measure": value,
            "before": kept.value,
            "kept": is_kept,
            "missing": {site: answers.failed.get(site, "other patients than before") for site in missing},
            "seconds": round(answers.seconds, 4),
        }
        after = self._with_holders(after, answers)
        if is_kept:
            return replace(after, measure=Measure(value, after.round_number, kept.patients)), line
        memory = replace(before.memory, step={}, holders=(), frozen_holders=after.memory.frozen_holders)
        return replace(before, round_number=after.round_number, memory=memory), line

    def _ask(self, state: ServerState, roster: Mapping[int, Handshake]) -> tuple[Contributions, Answers]:
        """Ask the sites for the measure of a model; return their sums, and the answers with all failures."""
        answers = ask_sums(self.grid, self.run, state, roster, Purpose.GATE, frozen=self.frozen, watch=self.watch)
        assert self.run.gate is not None
        if self.run.gate.measure == "labels":
            subjects = {handshake.site: handshake.subjects for handshake in roster.values()}
            sums = label_sums(self.run, self.embedding_size, subjects, answers)
            return sums.by_site, replace(answers, failed=sums.failed)
        losses, refused = answers.read(_loss)
        most = {handshake.site: handshake.subjects for handshake in roster.values()}
        for site in [site for site, (_, subjects) in losses.items() if subjects > most[site] * _MOST_VALIDATION]:
            refused[site] = f"validation loss: of {losses.pop(site)[1]} patients, the site trains on {most[site]}"
        return losses, replace(answers, failed={**answers.failed, **refused})

    def _value(self, contributions: Contributions) -> float:
        """The measure, lower is better; NaN without patients, or where their sums do not hold together."""
        assert self.run.gate is not None
        if self.run.gate.measure == "validation-loss":
            subjects = sum(subjects for _, subjects in contributions.values())
            return sum(loss for loss, _ in contributions.values()) / subjects if subjects else math.nan
        errors = []
        for task in self.run.probe.tasks:
            if sums := [given[task] for given in contributions.values() if task in given]:
                try:
                    errors.append(cross_validated_error(sums))
                except ProtocolError as error:
                    logger.warning("gate: %s: %s", task, error)
                    return math.nan
        known = [error for error in errors if math.isfinite(error)]
        return sum(known) / len(known) if known else math.nan

    def _with_holders(self, state: ServerState, answers: Answers) -> ServerState:
        """Add the sites that answered, which now have the untrained parameters, to the state's `frozen_holders`."""
        holders = {*state.memory.frozen_holders, *answers.replies} if self.frozen else ()
        return replace(state, memory=replace(state.memory, frozen_holders=tuple(sorted(holders))))


def _loss(reply: SumsReply) -> tuple[float, int]:
    loss, subjects = reply.loss, reply.loss_subjects
    if loss is None or subjects is None or not math.isfinite(loss) or subjects <= 0:
        raise ProtocolError("validation loss: missing, not finite, or of no patients")
    if abs(loss) > _LARGEST_LOSS * subjects:
        raise ProtocolError(f"validation loss: more than {_LARGEST_LOSS:g} a patient")
    return loss, subjects


def _patients(given: Any) -> dict[str, int]:
    """Task of labels -> number of patients behind a site's sums of it; `val` -> those behind its loss."""
    if isinstance(given, tuple):
        return {"val": given[1]}
    return {task: int(sums.count) for task, sums in sorted(given.items())}


def _of(contributions: Contributions, site: str) -> dict[str, int]:
    return _patients(contributions[site]) if site in contributions else {}
