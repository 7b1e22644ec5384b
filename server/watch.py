"""A run, watched from its folder until it ends: live on a terminal, plain lines elsewhere."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live

from panfm.errors import RunError
from panfm.report.run_files import Run, read_run
from server.flower import FlowerRun
from server.progress import Progress
from server.screen import screen

logger = logging.getLogger(__name__)
View = Callable[[Run], None]
_POLL_S = 1.0
_STATUS_S = 10.0
"""A look at Flower's status costs a process; the rounds are read from the run folder meanwhile."""
_SILENCE_S = 600.0
"""A SuperLink that has not answered for so long, with no round done either, is taken for gone."""


class Lines:
    """A line for each round, and one for each site that it had to do without."""

    def __init__(self, console: Console | None = None, *, shown: int = 0) -> None:
        """Args: shown: Rounds that are known already."""
        self._progress = Progress(console)
        self._shown = shown

    def __call__(self, run: Run) -> None:
        """Show the rounds that are new."""
        for line in run.rounds[self._shown :]:
            self._progress.round(run.config, line)
        self._shown = len(run.rounds)


@contextmanager
def view(console: Console) -> Iterator[View]:
    """A live screen on a terminal, plain lines elsewhere."""
    if not console.is_terminal:
        yield Lines(console)
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda run: live.update(screen(run), refresh=True)


def follow(run_dir: Path, show: View, flower: FlowerRun | None, environment: Mapping[str, str]) -> None:
    """Show a run until it has ended.

    Args:
        flower: Where Flower runs it; None: it is watched as long as a process is at work in the folder.
    Raises:
        RunError: it ended without doing what was asked; the line says why.
    """
    status, details, rounds = "", "", 0
    asked = heard = time.monotonic()
    while True:
        run = read_run(run_dir)
        show(run)
        if len(run.rounds) > rounds:
            rounds, heard = len(run.rounds), time.monotonic()
        if flower is None:
            if not run.is_at_work:
                break
        elif (run.is_finished and not run.is_at_work) or time.monotonic() - asked > _STATUS_S:
            asked = time.monotonic()
            try:
                status, details = flower.entry(environment)
            except RunError as error:
                if not run.is_at_work or asked - heard > _SILENCE_S:
                    raise
                logger.warning("%s; the run goes on", error)
                continue
            heard = asked
            if status.startswith("finished"):
                break
        time.sleep(_POLL_S)
    show(run := read_run(run_dir))
    if not run.is_finished or (flower and status != "finished:completed"):
        raise RunError(f"{run_dir}: {why_not_finished(run, status, details)}")


def why_not_finished(run: Run, status: str = "", details: str = "") -> str:
    """One line: what the server wrote down, or else what Flower knows."""
    done = f"after {len(run.rounds)} of {run.config.train.rounds} rounds"
    if run.failure:
        return f"{run.ending} {done}: {run.failure}"
    return f"{run.state} {done}" + (f"; Flower: {status}: {details}" if status else "")
