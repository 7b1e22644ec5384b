"""One site's answers to an invitation, to a round, and to a question for sums over its patients or for an evaluation.

Without Flower: the ClientApp calls it in a simulation, the resident worker in a hospital. It reads the site's own
folder, and gets from outside one `Invitation`, one `RoundTask` per round and, in a run with `probe.tasks`, `[gate]` or
streams with `input-constants`, or for an evaluation after its last round, `SumsTask`s.
"""

import contextlib
import logging
import platform
import time
import traceback
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from panfm import __version__
from panfm.config import (
    Releasable,
    RunConfig,
    SiteConfig,
    dump_toml,
    experiment_hash,
    parse_run,
    parse_site,
    read_site_text,
    site_path,
)
from panfm.config.streams import StreamConfig
from panfm.data.cache import open_store
from panfm.data.store import ImageStore
from panfm.errors import ConfigError, LedgerError, LimitError, ProtocolError
from panfm.models.sizes import sizes_of
from panfm.privacy.guarantees import checked_run, claim
from panfm.sharing.messages import Handshake, Invitation, Records, RoundReply, RoundTask
from panfm.sharing.release import build_handshake, build_reply, build_sums_reply, check_may_take_part
from panfm.site.admission import admit, check_other_runs
from panfm.site.approvals import Approvals, check_approved
from panfm.site.audit_log import AuditLog
from panfm.site.experiment_requests import keep_request
from panfm.site.floors import Floors
from panfm.site.session import Monitors, Session
from panfm.site.state import StateStore, make_room
from panfm.texts import check_text

if TYPE_CHECKING:
    from panfm.site.patient_budget import PatientBudget

logger = logging.getLogger(__name__)
_MAX_LOG_BYTES = 1 << 24
"""A `site.log` larger than this becomes `site.log.1`."""
_MAX_STORY = 1 << 16
"""Characters of one error in it."""
_SETTLE_S = 0.2
"""A `site.toml` that has changed is read until two reads this far apart agree: an editor may be half-way through."""


class Site:
    """One site folder, which answers invitations and rounds.

    Guarantees:
        repeatable: the same task gives the same reply, however often it is asked, in whichever process. In a private
            run, whose answers draw noise and are paid for, the last reply is kept and repeated.
        own limits: what `site.toml` does not allow to leave is in no reply.
    """

    def __init__(self, folder: Path, state_dir: Path | None = None, *, needs_approval: bool = False) -> None:
        """Open a site.

        Args:
            folder: The site folder.
            state_dir: Where private state is kept, instead of where `site.toml` says.
            needs_approval: Whether the operator must have approved an experiment: in a hospital, not in a simulation.
        """
        self.folder = folder
        self._text = read_site_text(folder)
        """Text of `site.toml` that `config` was read from."""
        self.config = parse_site(self._text, str(folder / "site.toml"))
        self.state_dir = state_dir or site_path(folder, self.config.state_dir)
        self.asked_run: RunConfig | None = None
        """The run of the current question; None if it names no valid one."""
        self.asked_round: tuple[str, int] | None = None
        """Run id and round of the current question; None if it asks for no round."""
        self._needs_approval = needs_approval
        self.summed: dict[str, Any] | None = None
        """Purpose, and labels or streams, of the sums or the score in the current answer; None if it holds none."""
        self.is_repeat = False
        """Whether the current answer is a private reply that the same question has had before."""
        self._warm: tuple[str, Session] | None = None

    def refresh(self) -> None:
        """Take over the limits, and all else in `site.toml`, if its text has changed since it was last taken over.

        Raises:
            ConfigError: the file cannot be read, does not hold, or has changed in what is read only when a worker
                starts. Nobody can tell whether its old or its new limits are the stricter, so nothing is answered.
        """
        if (text := _settled_text(self.folder, self._text)) == self._text:
            return
        path = self.folder / "site.toml"
        config = parse_site(text, str(path))
        if changed := [
            key for key, value in _read_at_start(config).items() if value != _read_at_start(self.config)[key]
        ]:
            raise ConfigError(f"{path}: {', '.join(changed)}: read when the worker starts, expected it to start again")
        logger.warning("%s has changed: its limits are in force", path)
        self._text, self.config, self._warm = text, config, None
        self.__dict__.pop("_budget", None)

    def check_unchanged(self) -> None:
        """Check, before an answer leaves, that the operator still lets it leave.

        Raises:
            LimitError: the limits were changed while the answer was computed, or the approval was revoked.
            ConfigError: as `refresh` does.
        """
        before = self.config
        self.refresh()
        if self.config != before:
            raise LimitError.of_question("this site's limits were changed during this question, ask again")
        if self.asked_run:
            self._check_approved(self.asked_run)

    def handshake(self, invitation: Invitation) -> Handshake:
        """Open the data, build the model, and answer the server's invitation before round 1.

        Raises:
            DataError: the data is faulty, or holds none of the run's streams.
            ProtocolError: the run description does not hold, or the site's limits make taking part impossible.
        """
        check_may_take_part(self.config.limits.may_leave)
        session = self._session(invitation.run_toml)
        subjects, streams = self._counts(session)
        return build_handshake(
            self.config.name,
            experiment_hash(read_run(invitation.run_toml)),
            session.manifest,
            {"panfm": __version__, "torch": torch.__version__, "python": platform.python_version()},
            subjects=subjects,
            streams=streams,
            may_leave=self.config.limits.may_leave,
        )

    def _counts(self, session: Session) -> tuple[int, dict[str, int]]:
        """Subjects in all and by stream: public numbers in a private run, 0 where the server is to publish none."""
        if session.run.patient_dp or session.run.site_dp:
            public = session.run.patient_dp.public_subjects if session.run.patient_dp else 0
            return public, dict.fromkeys(session.streams, public)
        return len(session.store.indices("train")), session.streams

    def train_round(self, task: RoundTask) -> RoundReply:
        """Train one round and reply.

        Raises:
            ProtocolError: the task does not fit.
            DataError: the private state is corrupted.
            BudgetError, LedgerError: the run is private, and the site cannot pay for the round.
        """
        session, states = self._opened(task, asked_round=(task.run_id, task.round_number))
        result = session.train_round(task, states)
        self.is_repeat = result.is_repeat
        return build_reply(task, result, may_leave=self.config.limits.may_leave)

    def give_sums(self, question: Records) -> Records:
        """Answer a question for sums over patients or for an evaluation (sums_answer.py).

        Raises:
            ProtocolError: the question does not fit, or the run or this site allows no such sums.
            DataError: the label table or the private state is faulty.
        """
        from panfm.sharing.sums_messages import Purpose, SumsTask  # a worker that is never asked does without
        from panfm.site.sums_answer import describe_answer, sum_patients

        task = SumsTask.from_records(question)
        session, states = self._opened(task.model, more_rounds=1, has_constants=task.purpose is not Purpose.INPUTS)
        result = sum_patients(session, task, states, folder=self.folder, site=self.config)
        self.summed = describe_answer(session.run, task, result)
        return build_sums_reply(task.model, result, may_leave=self.config.limits.may_leave).to_records()

    def _opened(
        self,
        task: RoundTask,
        *,
        more_rounds: int = 0,
        has_constants: bool = True,
        asked_round: tuple[str, int] | None = None,
    ) -> tuple[Session, StateStore]:
        """Session and private states of a task's run, if the site takes part in it.

        Args:
            more_rounds: Rounds after the run's last one that the task may name.
            has_constants: Whether the run must have the constants of all streams' inputs.
            asked_round: Run id and number of the round to train, if the task asks for one.
        """
        check_may_take_part(self.config.limits.may_leave)
        session = self._session(task.run_toml, asked_round)
        if has_constants and session.run.summed_streams:
            raise ProtocolError(f"input-centre of {session.run.summed_streams[0]}: missing, computed before round 1")
        last = session.run.train.rounds + more_rounds
        if not 1 <= task.round_number <= last:
            raise ProtocolError(f"round {task.round_number}: expected 1 to {last}")
        states = StateStore(self.state_dir, task.run_id, session.origin)
        check_other_runs(self.state_dir, task.run_id, self.config.limits)
        make_room(states.folder, sizes_of(session.run).kept_bytes, self.config.limits)
        return session, states

    @property
    def experiment(self) -> str | None:
        """Hash of the current question's experiment; None without one."""
        return experiment_hash(self.asked_run) if self.asked_run else None

    @property
    def privacy(self) -> str:
        """Privacy claim of the current question's run for its patients; "none" without one."""
        return claim(self.asked_run) or "none" if self.asked_run else "none"

    @property
    def epsilon_spent(self) -> float | None:
        """Epsilon after the ledger's newest round; None if the current question is of no private run, or the ledger is
        faulty."""
        if self.asked_run is None or self.asked_run.patient_dp is None:
            return None
        try:
            return self._budget.ledger.spent()
        except LedgerError:
            return None

    def log_error(self, error: BaseException) -> None:
        """Append an error with its traceback to `site.log` in the state folder; errors of the disk are ignored."""
        story = f"{datetime.now().astimezone().isoformat()}\n{''.join(traceback.format_exception(error))}\n"
        path = self.state_dir / "site.log"
        with contextlib.suppress(OSError):
            self.state_dir.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size > _MAX_LOG_BYTES:
                path.replace(path.with_suffix(".log.1"))
            with path.open("a", encoding="utf-8", errors="backslashreplace") as log:
                log.write(story[-_MAX_STORY:])

    @cached_property
    def _budget(self) -> "PatientBudget":
        """One for all runs: the anchor lies where `site.toml` keeps private state, wherever this run's is kept."""
        from panfm.site.patient_budget import PatientBudget  # imported here: only private runs need it

        return PatientBudget(self.folder, self.config, site_path(self.folder, self.config.state_dir))

    def _check_approved(self, run: RunConfig) -> None:
        """Keep the description of a run for the operator, and check that the operator has approved it.

        Raises:
            PendingApprovalError, LimitError: the run is not approved, or no longer.
            DataError: the register of approvals does not hold.
        """
        if not self._needs_approval:
            return
        experiment = experiment_hash(run)
        decisions = Approvals(self.folder, self.config).decisions()
        keep_request(self.state_dir, run, experiment, decisions)
        check_approved(
            experiment,
            decisions.get(experiment),
            asked=self.asked_round,
            answered=lambda: AuditLog(self.state_dir).rounds_of(experiment),
        )

    def _session(self, run_toml: str, asked_round: tuple[str, int] | None = None) -> Session:
        """The warm session of a run description, or a new one in its place, if the operator has approved the run."""
        self.asked_run, self.summed, self.is_repeat = None, None, False
        run = self.asked_run = read_run(run_toml)
        self.asked_round = asked_round
        self._check_approved(run)
        if self._warm is None or self._warm[0] != run_toml:
            run = admit(run, self.config)
            floors = Floors.of(self.config.limits, run.patient_dp)
            self._warm = None  # lets go of the memory of the run before
            store = self._open_store(run, floors)
            budget = self._budget if run.patient_dp else None
            threads = self.config.limits.reading_threads
            args = (self.config.name, run, store, floors, budget, self._monitors())
            session = partial(Session, *args, workers=threads)
            if (devices := self.config.limits.devices) > 1:
                from panfm.site.spread_session import spread_session  # a site with one device does without

                session = partial(spread_session, partial(_reopen, self.folder, run_toml), devices, session)
            self._warm = (run_toml, session())
        return self._warm[1]

    def _monitors(self) -> Monitors | None:
        if Releasable.MONITORS not in self.config.limits.may_leave:
            return None
        from panfm.site.round_monitors import RoundMonitors  # a site that keeps monitors to itself does without

        return RoundMonitors(self.folder, self.config).after

    def _open_store(self, run: RunConfig, floors: Floors) -> ImageStore:
        """Images of a run's streams, with the labels of its task; without streams that too few training subjects
        hold."""
        store = self._open_streams(run, run.streams, floors)
        store.members("train", str(self.folder))
        few = floors.streams_below(store, [store.indices("train")])
        if not few:
            return store
        enough = {name: stream for name, stream in run.streams.items() if name in store.rows and name not in few}
        floors.check_subjects(store, list(enough))
        return self._open_streams(run, enough, floors)

    def _open_streams(self, run: RunConfig, streams: Mapping[str, StreamConfig], floors: Floors) -> ImageStore:
        store = open_store(self.folder, streams)
        if run.task is None:
            return store
        from panfm.data.task_labels import with_task_labels  # a worker whose runs have no task does without

        return with_task_labels(store, self.folder, self.config, run, smallest_class=floors.batch)


def _reopen(folder: Path, run_toml: str) -> Session:
    """A session for another process of the site, which keeps no state."""
    return Site(folder)._session(run_toml)


def _settled_text(folder: Path, known: str) -> str:
    """Text of `site.toml`; if it is not the known one, once two reads agree."""
    text = read_site_text(folder)
    while text != known:
        time.sleep(_SETTLE_S)
        before, text = text, read_site_text(folder)
        if text == before:
            break
    return text


def _read_at_start(config: SiteConfig) -> dict[str, object]:
    """Values of `site.toml` that a worker reads only when it starts, by key."""
    limits, worker = config.limits, config.worker
    return {
        "name": config.name,
        "state-dir": config.state_dir,
        "limits.memory-gib": limits.memory_gib,
        "worker": worker,
    }


@lru_cache(maxsize=1)
def read_run(run_toml: str) -> RunConfig:
    """The server's run description, if the run can keep the privacy that it promises.

    What is wrong with it, the server may hear: they are its own words.
    """
    try:
        run = checked_run(parse_run(run_toml))
        check_text(dump_toml(run), "run description: with all defaults")
    except ConfigError as error:
        raise ProtocolError(str(error)) from error
    return run
