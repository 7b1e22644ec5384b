"""Notes in the history when the SuperLink of a run does not answer, and when it answers again."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from flwr.serverapp import Grid

from panfm.report.run_events import EventKind
from server.events import ENDS, EventLog
from server.nudging_grid import NudgingGrid
from server.run_folder import RunFolder

_ASKED_EVERY_S = 5.0
_SILENT_S = 30.0
_LOOK_S = 1.0


class _Answers:
    """Asks a SuperLink again and again, on a thread that waits as long as Flower's own client does."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.last = time.monotonic()
        """When it has answered last."""
        self._stopped = threading.Event()

    def ask(self) -> None:
        """Ask until `stop`; every error is no answer."""
        while not self._stopped.wait(_ASKED_EVERY_S):
            try:
                self._grid.get_node_ids()
            except Exception:
                continue
            self.last = time.monotonic()

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()


@contextmanager
def outages_survived(grid: Grid, folder: RunFolder, *, is_simulated: bool) -> Iterator[Grid]:
    """Yield a grid that tries calls again while the SuperLink is down and pings nodes that owe a reply, and note each
    outage and its end until the block ends; in a simulation, which has no SuperLink, the grid itself."""
    if is_simulated:
        yield grid
        return
    with superlink_watched(grid, folder.events):
        yield NudgingGrid(grid, folder.run.federation.wait_for_quorum_s)


@contextmanager
def superlink_watched(grid: Grid, events: EventLog) -> Iterator[None]:
    """Note an outage of the SuperLink, and its end, until the block ends.

    Args:
        grid: Flower's own: one that tries again by itself would hide an outage that Flower's client notices.
    """
    answers, stopped = _Answers(grid), threading.Event()

    def look() -> None:
        while not stopped.wait(_LOOK_S):
            if events.last is not None and events.last not in ENDS:
                _note(events, time.monotonic() - answers.last)

    asking = threading.Thread(target=answers.ask, name="superlink-ask", daemon=True)
    looking = threading.Thread(target=look, name="superlink-watch", daemon=True)
    asking.start()
    looking.start()
    try:
        yield
    finally:
        answers.stop()
        stopped.set()
        looking.join()


def _note(events: EventLog, silent_s: float) -> None:
    is_down = silent_s > _SILENT_S
    words = f"has not answered for {silent_s:.0f} s" if is_down else "answers again"
    events.note_level(EventKind.SUPERLINK, "down" if is_down else None, words, of="superlink")
