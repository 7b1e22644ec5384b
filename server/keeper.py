"""Keeps a run going: submits it again from its last checkpoint whenever it has ended by something that heals.

    at work            somebody holds the lock of the run folder: nothing is to be done
    finished           there is a model: the end
    stopped            by the coordinator: the end
    failed             of what cannot heal (ended.json says so): the end; else it is submitted again
    interrupted        ServerApp or SuperLink died: it is submitted again

The lock decides, not what Flower says: of two ServerApps on one run folder the second ends and changes nothing. So a
keeper that was killed after Flower had taken the run, and before it could note Flower's id, does no harm; it waits a
minute for that ServerApp before it submits another.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from panfm.errors import RunError, reason
from panfm.files import locked
from panfm.report.run_files import Run, read_run
from server.flower_cli import FlowerRun, flwr
from server.run_folder import ENDED

logger = logging.getLogger(__name__)
_TURN = ".turn"
_TURN_S = 300.0
SUBMITTING = "submitting"
"""In the run folder, from before Flower is asked until its answer is noted."""
_POLL_S = 10.0
"""Between looks; if nobody is at work, each costs a process of Flower's command line."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 10.0, 600.0
_START_S = 60.0
"""A ServerApp is at work so long after Flower has taken its run."""
_MOST_ERRORS = 5
"""Internal errors, or ends without a word, in a row and without a round between them, after which a run is given up."""


class GaveUpError(RunError):
    """The run goes on only if somebody does something."""


class Keeper:
    """Keeps one run going."""

    def __init__(
        self,
        run_dir: Path,
        flower: Callable[[], FlowerRun | None],
        submit: Callable[[], None],
        environment: Mapping[str, str],
    ) -> None:
        """Args: flower: Where Flower runs it. submit: Hands the run to Flower once more."""
        self._run_dir = run_dir
        self._flower = flower
        self._submit = submit
        self._environment = environment
        self._pause = _FIRST_PAUSE_S
        self._rounds = -1
        self._errors = 0

    def keep(self) -> None:
        """Return when the run has finished. Raises GaveUpError if it was stopped or cannot go on by itself."""
        while True:
            run = read_run(self._run_dir)
            if run.is_finished and not run.is_at_work:
                return
            if run.is_at_work or self._is_starting() or not self._has_ended(run):
                time.sleep(_POLL_S)
                continue
            if (now := read_run(self._run_dir)).is_at_work or now.is_finished:
                continue
            self._go_on(now)

    def _go_on(self, run: Run) -> None:
        """Submit the run again after a pause, which grows until a round is done."""
        if len(run.rounds) > self._rounds:
            self._rounds, self._pause, self._errors = len(run.rounds), _FIRST_PAUSE_S, 0
        why = run.failure or "ended without a word"
        self._errors += not run.ending or run.failure.startswith("internal error")
        if self._errors > _MOST_ERRORS:
            raise GaveUpError(f"{self._run_dir}: {self._errors} times in a row: {why}")
        flower = self._flower()
        logger.warning("%s: ended (%s), goes on in %g s", self._run_dir, why, self._pause)
        time.sleep(self._pause)
        self._pause = min(2.0 * self._pause, _LONGEST_PAUSE_S)
        with in_turn(self._run_dir):
            now = read_run(self._run_dir)
            if now.is_at_work or now.is_finished or now.ending != run.ending or self._flower() != flower:
                return  # somebody has resumed or stopped it meanwhile
            try:
                self._submit()
            except RunError as error:
                logger.warning("%s: cannot be submitted (%s)", self._run_dir, error)

    def _is_starting(self) -> bool:
        """Whether Flower may have taken the run just now, without a note of its id."""
        try:
            return 0.0 <= time.time() - (self._run_dir / SUBMITTING).stat().st_mtime < _START_S
        except FileNotFoundError:
            return False

    def _has_ended(self, run: Run) -> bool:
        """Whether the run has ended, by its folder or by Flower. Raises GaveUpError if it must not go on by itself."""
        if run.ending == "stopped":
            raise GaveUpError(f"{self._run_dir}: was stopped by the coordinator")
        if run.ending and not can_heal(self._run_dir):
            raise GaveUpError(f"{self._run_dir}: cannot go on by itself: {run.failure}")
        if (flower := self._flower()) is None:
            return True
        try:
            status, _ = flower.entry(self._environment)
        except RunError as error:
            logger.warning("%s", error)
            return self._is_forgotten(flower)
        if status == "finished:stopped":
            raise GaveUpError(f"{self._run_dir}: was stopped by the coordinator")
        return status.startswith("finished")

    def _is_forgotten(self, flower: FlowerRun) -> bool:
        """Whether the SuperLink answers, and so does not know the run."""
        try:
            flwr(["list", flower.connection], self._environment)
        except RunError:
            return False
        return True


@contextmanager
def in_turn(run_dir: Path) -> Iterator[None]:
    """Decide alone whether a run goes on: `keep`, `resume` and `stop` wait for each other.

    Raises:
        RunError: another of them is at work for long.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(run_dir / _TURN, wait_s=_TURN_S))
        except OSError as error:
            raise RunError(f"{run_dir}: another command decides on this run, or {reason(error)}") from error
        yield


def can_heal(run_dir: Path) -> bool:
    """Whether a run that has ended may go on by itself, by its ended.json; without one it may."""
    try:
        return bool(json.loads((run_dir / ENDED).read_text(encoding="utf-8")).get("can-heal"))
    except (OSError, ValueError):
        return True
