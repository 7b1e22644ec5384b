"""Lines that `panfm site requests`, `approve` and `reject` print; the worker does without them."""

import os
import pwd
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from panfm.config import RunConfig, SiteConfig, as_told, site_path
from panfm.config.differences import changed_keys
from panfm.errors import DataError, PanfmError, one_line
from panfm.privacy.guarantees import privacy_label
from panfm.site.approvals import Decision, check_approved
from panfm.site.audit_log import AuditLog
from panfm.site.decisions import WritableApprovals
from panfm.site.experiment_requests import ExperimentRequest, read_requests

_SHORT = 12
"""Characters of a hash that are enough to name it."""


def login_name() -> str:
    """Name of the person at this terminal, also behind `sudo`; else the name of the account, or its number."""
    with suppress(OSError):
        return os.getlogin()
    with suppress(KeyError):  # an account of a container may have no name
        return pwd.getpwuid(os.getuid()).pw_name
    return str(os.getuid())


class Experiments:
    """Experiments that have asked a site or that its operator has decided on, as commands show them."""

    def __init__(self, folder: Path, site: SiteConfig) -> None:
        """Read requests and register. Raises DataError: the register does not hold."""
        self.folder = folder
        self.site = site
        self.state_dir = site_path(folder, site.state_dir)
        self.register = WritableApprovals(folder, site)
        self.decisions = self.register.decisions()
        self.requests = {request.experiment: request for request in read_requests(self.state_dir)}

    def find(self, prefix: str) -> str:
        """Complete a hash. Raises DataError: it names no experiment, or several."""
        return full_hash(prefix, [*self.requests, *self.decisions])

    def state(self, experiment: str) -> str:
        """The decision on an experiment in words, and how much of an approval is left."""
        decision = self.decisions.get(experiment)
        try:
            check_approved(experiment, decision)
        except PanfmError:
            return f"{decision}: has ended" if decision and decision.is_approved else str(decision or "pending")
        if decision and decision.max_rounds:
            return f"{decision}: {len(AuditLog(self.state_dir).rounds_of(experiment))} answered"
        return str(decision)

    def lines(self) -> Iterator[str]:
        """Yield two lines for each experiment, those without a decision last."""
        names = dict.fromkeys([*self.decisions, *self.requests])
        if not names:
            yield "no run has asked this site for anything yet"
        for experiment in names:
            yield f"{experiment} {_title(self.requests.get(experiment))}"
            asked = self.requests.get(experiment)
            first = f"; first asked {_day(asked.asked)}" if asked else "; no run has asked for it yet"
            yield f"  {self.state(experiment)}{first}"
        pending = [experiment for experiment in names if experiment not in self.decisions]
        for experiment in pending:
            yield f"read it with: panfm site requests {self.folder} {experiment[:_SHORT]}"

    def details(self, experiment: str) -> Iterator[str]:
        """Yield an experiment's description, its difference from the last approved one, its cost, and what would leave.

        Raises:
            DataError: no run has asked for it.
            ConfigError: this version of panfm does not read its description.
        """
        if not (request := self.requests.get(experiment)):
            raise DataError(
                f"{experiment}: no run has asked for it, expected one of: panfm site requests {self.folder}"
            )
        run = request.read()
        yield f"experiment {experiment}: {self.state(experiment)}; first asked {_day(request.asked)}"
        yield from _description(run)
        yield f"whole description: {request.path}"
        yield from self._difference(experiment, run)
        yield from self._epsilon(run)
        yield from self._dry_run(run)
        place = f"{self.folder} {experiment[:_SHORT]}"
        yield f"decide with: panfm site approve {place} [--until DATE] [--max-rounds N], or: panfm site reject {place}"

    def _difference(self, experiment: str, run: RunConfig) -> Iterator[str]:
        """Yield the keys that differ from the experiment that was approved last."""
        approved = [name for name, decision in self.decisions.items() if decision.is_approved and name != experiment]
        known = [name for name in approved if name in self.requests]
        if not known:
            yield "no other experiment was approved, or its description is not known: nothing to compare with"
            return
        changed = changed_keys(as_told(run), self.requests[known[-1]].read())
        yield f"difference from the last approved, {known[-1][:_SHORT]}:{'' if changed else ' none that counts'}"
        for key, (value, before) in changed.items():
            yield f"  {one_line(key, 100)}: {value!r:.60}, was {before!r:.60}"

    def _epsilon(self, run: RunConfig) -> Iterator[str]:
        """Yield the privacy that a run promises; of a private run, the epsilon that it would add to the ledger."""
        if run.patient_dp is None:
            yield f"privacy: {privacy_label(run)}"
            return
        from panfm.privacy.statement import plan
        from panfm.site.admission import with_public_subjects
        from panfm.site.patient_budget import PatientBudget

        try:
            entries = PatientBudget(self.folder, self.site, self.state_dir).ledger.entries()
            lines = plan(with_public_subjects(run, self.site), entries)
        except PanfmError as error:
            lines = [str(error)]
        yield f"privacy: {privacy_label(run)}; with what is spent already:"
        yield from (f"  {line}" for line in lines)

    def _dry_run(self, run: RunConfig) -> Iterator[str]:
        """Yield the cost of one local step and the messages that would leave, or why this site would refuse the run."""
        from panfm.cli.dry_run_lines import cost_lines
        from panfm.site.dry_run import dry_run

        try:
            yield from cost_lines(dry_run(self.folder, run))
        except PanfmError as error:
            yield f"dry run: this site would refuse it: {error}"


def full_hash(prefix: str, known: Iterable[str]) -> str:
    """Complete the first characters of an experiment's hash.

    Args:
        prefix: A whole hash, known or not, or at least 8 characters of a known one.
        known: Hashes of the experiments that were asked for or decided on.
    Raises:
        DataError: it is no such text, or begins none or several of the known hashes.
    """
    start = prefix.strip().lower()
    if set(start) - set("0123456789abcdef") or not 8 <= len(start) <= 64:
        raise DataError(f"{prefix!r:.80}: expected 8 to 64 characters 0-9 and a-f of an experiment's hash")
    if len(start) == 64:
        return start
    matches = sorted({name for name in known if name.startswith(start)})
    if len(matches) != 1:
        state = f"begins {len(matches)} experiments" if matches else "begins no experiment that was asked for"
        raise DataError(f"{start}: {state}, expected one; panfm site requests SITE lists them")
    return matches[0]


def decided_lines(experiment: str, decision: Decision, request: ExperimentRequest | None) -> Iterator[str]:
    """Yield the decision on an experiment in words, and the note that it is in force."""
    yield f"{experiment} {_title(request)}"
    yield f"  {decision}; in force from the next question on"
    if not request:
        yield "  no run has asked for it yet: compare all 64 characters with those of the coordinator"


def _title(request: ExperimentRequest | None) -> str:
    if not request:
        return ""
    try:
        run = request.read()
    except PanfmError:
        return "(a description of another version of panfm)"
    return f"{run.name}: {run.train.rounds} rounds, privacy: {privacy_label(run)}"


def _description(run: RunConfig) -> Iterator[str]:
    """Yield name, length, streams, model and start of a run."""
    train, model = run.train, run.model
    yield f"name {run.name}: {train.rounds} rounds of {train.local_steps} local steps, batches of {train.batch_size}"
    yield f"streams: {', '.join(run.streams)}"
    yield f"model: {model.backbone}, size {model.size}; objective {run.objective.name}; experts {run.sharing.experts}"
    if run.start:
        yield f"starts from the model {run.start.sha256 or '(not named)'}, held to the hashes of the description"


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
