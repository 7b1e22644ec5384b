"""Waits for a quorum: repeats a step of a run until enough sites take part in it.

A step (the handshake, an exchange of sums, a round) without a quorum raises `NoQuorumError`. Nothing of it counts, and
it is tried again, after pauses that grow, until there are enough sites or `federation.wait-for-quorum-s` is over.

It is not tried again if the sites that could still give what is asked are too few. Three kinds of refusals are
decisions that asking again does not change: BudgetError, LimitError, ProtocolError; so are misfits of software or
model, and replies that the server's guards refuse, since the same question gets the same answer. All others can heal:
a site is offline, late or killed, its operator has yet to approve (PendingApprovalError), its disk is full, its data or
its own description are at fault and can be repaired.
"""

import logging
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from panfm.errors import RunError
from panfm.report.run_events import EventKind
from server.events import EventLog
from server.exchange import Answers
from server.progress_file import ProgressFile

R = TypeVar("R")
logger = logging.getLogger(__name__)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0
_FINAL = re.compile(r"(node [^:]+: )?(site [^:]+: )?(BudgetError|LimitError|ProtocolError): ")


class NoQuorumError(RunError):
    """Too few sites take part in a step of a run."""

    def __init__(self, text: str, *, can_heal: bool, line: Mapping[str, Any] | None = None) -> None:
        """Args: line: Of a round, as for rounds.jsonl."""
        super().__init__(text)
        self.can_heal = can_heal
        self.line = line

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the error with all of its parts, as the worker process of a study sends it."""
        return partial(NoQuorumError, can_heal=self.can_heal, line=self.line), (str(self),)


def is_final(reason: str) -> bool:
    """Whether a site's refusal is a decision, which asking again does not change."""
    return bool(_FINAL.match(reason))


def require_answers(answers: Answers, at_least: int, step: str) -> None:
    """Raises NoQuorumError if fewer sites than needed have answered a question for sums, and others still may."""
    missing = [reason for reason in answers.failed.values() if not is_final(reason)]
    if missing and len(answers.replies) < at_least:
        reasons = "; ".join(f"{site}: {reason}" for site, reason in answers.failed.items())
        raise NoQuorumError(f"{step}: {len(answers.replies)} answers, {at_least} needed: {reasons}", can_heal=True)


class QuorumWait:
    """Repeats steps of one run until enough sites take part in them."""

    def __init__(self, wait_s: float, events: EventLog, progress: ProgressFile) -> None:
        """Args: wait_s: For each step, at most; 0: no step is repeated."""
        self.wait_s = wait_s
        self._events = events
        self._progress = progress

    def until_quorum(self, step: str, attempt: Callable[[], R]) -> R:
        """Return what the first attempt with a quorum returns.

        Args:
            step: What is attempted, for people: `round 7`.
        Raises:
            NoQuorumError: it cannot heal, or the time is over.
        """
        start, pause = time.monotonic(), FIRST_PAUSE_S
        is_waiting = False
        while True:
            self._progress.begin(step)
            try:
                result = attempt()
            except NoQuorumError as error:
                start = start if is_waiting else time.monotonic()
                left = self.wait_s - (time.monotonic() - start)
                if not error.can_heal or self.wait_s == 0.0:
                    raise
                if left <= 0.0:
                    over = f"{error}; waited {self.wait_s:g} s (federation.wait-for-quorum-s); the run can be resumed"
                    raise NoQuorumError(over, can_heal=True, line=error.line) from error
                is_waiting = True
                self._progress.wait(str(error))
                self._events.note(EventKind.WAITING, str(error))
                logger.warning("%s; asked again in %g s", error, min(pause, left))
                time.sleep(min(pause, left))
                pause = min(2.0 * pause, LONGEST_PAUSE_S)
            else:
                if is_waiting:
                    self._progress.go_on()
                # Also where an earlier server has begun to wait; it is no event if nobody has.
                self._events.note(EventKind.QUORUM, f"{step}: enough sites after {time.monotonic() - start:.0f} s")
                return result
