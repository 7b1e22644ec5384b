"""The history of a run: `events.jsonl` in the run folder, to which lines are only added.

    time       ISO 8601, UTC
    run        id of the run; null before it is known
    round      number of the round, the last one done between rounds
    kind       one of `EventKind`
    site       the site that it is about; null if it is about the run
    words      one line for people
    details    further values by name

A state is noted when it begins and when it is over, not once more for each round that it lasts: `left-out` (once for
each reason, numbers aside) and `away` until `back`, `waiting` until `quorum`; `disk`, `certificate` and `superlink`
while the level stays the same. A site that was left out and is then offline is missing as before, so that is no second
event. So one line is one event, also over a resume, and everything that tells people of events (alerts.py, metrics.py)
reads them here.
"""

import errno
import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from panfm.errors import one_line
from panfm.files import lock, sync
from panfm.outputs import json_text
from panfm.report.run_events import FILE, Event, EventKind, read_events

logger = logging.getLogger(__name__)
ENDS = frozenset({EventKind.FAILED, EventKind.STOPPED, EventKind.FINISHED})
"""After one of them no server is at work."""
_OVER = {EventKind.BACK, EventKind.QUORUM}
_LASTING = {EventKind.LEFT_OUT, EventKind.AWAY, EventKind.WAITING}


class EventLog:
    """Events of one run, read from and added to its folder.

    Guarantees:
        harmless: no error of the disk reaches the run; events that could not be written are written with the next one.
        torn: a last line without its end, which a crash leaves, is no event, and the next one takes its place.
    """

    def __init__(self, folder: Path) -> None:
        """Read what has happened so far.

        Args:
            folder: The run folder.
        Raises:
            DataError: the file is damaged.
        """
        self.path = folder / FILE
        self.on_event: list[Callable[[], None]] = []
        """Called after an event was written."""
        self._lock = threading.RLock()
        self.run_id: str | None = None
        self.round_number = 0
        self.last: EventKind | None = None
        self._lasting: dict[str | None, tuple[EventKind, str]] = {}
        """Site that is left out or away, or None for a run that waits -> the state, and why a site is left out."""
        self._levels: dict[tuple[EventKind, str | None, str], Any] = {}
        self._unwritten: list[Event] = []
        self._has_begun = False
        for event in read_events(folder):
            self._learn(event)

    def begin(self, run_id: str, round_number: int) -> None:
        """Note that a server is at work on the run from now on.

        If the one before it was killed, which it could not note itself, that is noted first.

        Args:
            round_number: The last round that is done.
        """
        has_begun = self._has_begun
        self.run_id, self.round_number = run_id, round_number
        self._note_missed(EventKind.FAILED, "the server was killed, or its machine went down")
        if has_begun or round_number:
            self.note(EventKind.RESUMED, f"goes on after round {round_number}")
        else:
            self.note(EventKind.STARTED, "the run begins")

    def note(
        self,
        kind: EventKind,
        words: str,
        *,
        site: str | None = None,
        round_number: int | None = None,
        **details: Any,
    ) -> None:
        """Add an event, unless it is a state that lasts already, or the end of one that had not begun."""
        with self._lock:
            if not self._is_news(kind, site, words):
                return
            if round_number is not None:
                self.round_number = round_number
            event = Event(
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                run=self.run_id,
                round=self.round_number,
                kind=kind,
                site=site,
                words=one_line(words),
                details=details,
            )
            self._learn(event)
            self._unwritten.append(event)
            self._write()
        for call in self.on_event:
            call()

    def _is_news(self, kind: EventKind, site: str | None, words: str) -> bool:
        """Whether an event changes what is known: no state that lasts, no end of one that had not begun."""
        lasting = self._lasting.get(site)
        if kind == EventKind.AWAY and lasting is not None and lasting[0] == EventKind.LEFT_OUT:
            return False
        return lasting != _state(kind, words) if kind in _LASTING else kind not in _OVER or lasting is not None

    def all(self) -> list[Event]:
        """Events of the file, then those that the disk has not taken. Raises DataError if the file is damaged."""
        with self._lock:
            return [*read_events(self.path.parent), *self._unwritten]

    def num_written(self) -> int:
        """How many events the file holds. Raises DataError if it is damaged."""
        with self._lock:
            return len(read_events(self.path.parent))

    def note_told_end(self, ended: Path) -> None:
        """Note the end that `ended.json` tells of, if the history lacks it because its disk was full."""
        try:
            told = json.loads(ended.read_text(encoding="utf-8"))
            kind, words = EventKind(told["state"]), str(told["reason"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return
        self._note_missed(kind, words)

    def note_level(self, kind: EventKind, level: str | None, words: str, *, of: str, site: str | None = None) -> None:
        """Add an event if the level of something (of a disk, a budget, a certificate) has changed.

        Args:
            level: None is the usual one, which is only told after another.
            of: Of what.
        """
        if self._levels.get((kind, site, of)) != level:
            self.note(kind, words, site=site, of=of, level=level)

    def note_round(self, line: Mapping[str, Any]) -> None:
        """Add what a round tells of its sites: who was left out, is away, came back, moved to another node, or lost its
        worker for a while. A round that does not count is not done.

        Args:
            line: Of rounds.jsonl.
        """
        number = self.round_number = line["round"]
        for site, words in line.get("moved", {}).items():
            self.note(EventKind.MOVED, words, site=site, round_number=number)
        for site in line.get("worker_lost", ()):
            words = "its worker went away or was not there when it was asked, and came back"
            self.note(EventKind.WORKER_LOST, words, site=site, round_number=number)
        for site, words in line["rejected"].items():
            self.note(EventKind.LEFT_OUT, words, site=site, round_number=number)
        for site, words in line.get("away", {}).items():
            self.note(EventKind.AWAY, words, site=site, round_number=number)
        for site in line["sites"]:
            self.note(EventKind.BACK, "has answered", site=site, round_number=number)
        out = {*line["rejected"], *line.get("away", {})}
        for node in [site for site in self._lasting if site and site.startswith("node ") and site not in out]:
            self.note(EventKind.BACK, "has joined or is gone", site=node, round_number=number)
        self.round_number = number if line.get("counts", True) else number - 1

    def _note_missed(self, end: EventKind, words: str) -> None:
        if self._has_begun and self.last not in ENDS:
            self.note(end, words, noticed="at resume")

    def _learn(self, event: Event) -> None:
        """Follow the states that last."""
        self._has_begun = True
        self.run_id, self.round_number, self.last = event.run, event.round, event.kind
        if event.kind in _LASTING:
            self._lasting[event.site] = _state(event.kind, event.words)
        elif event.kind in _OVER:
            self._lasting.pop(event.site, None)
        if "level" in event.details:
            self._levels[event.kind, event.site, event.details["of"]] = event.details["level"]

    def _write(self) -> None:
        try:
            append_lines(self.path, [event.model_dump(mode="json") for event in self._unwritten])
        except OSError as error:
            logger.warning("%s: cannot be written (%s)", self.path.name, error.strerror)
            return
        self._unwritten.clear()


def _state(kind: EventKind, words: str) -> tuple[EventKind, str]:
    """A state that lasts; a site that is left out for another reason, numbers aside, is in another one."""
    return kind, re.sub(r"\d+", "0", one_line(words)) if kind is EventKind.LEFT_OUT else ""


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add lines of JSON to a file instead of a last line without its end, and wait until they are on the disk.

    Raises:
        OSError: the disk did not take them; none of them is in the file then.
    """
    content = "".join(f"{json_text(line)}\n" for line in lines).encode()
    with path.open("a+b", buffering=0) as file:
        lock(file)
        file.seek(0)
        whole, newline, _ = file.read().rpartition(b"\n")
        size = len(whole) + len(newline)
        file.truncate(size)
        try:
            _write_whole(file, content)
            sync(file)
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def _write_whole(file: FileIO, content: bytes) -> None:
    if file.write(content) < len(content):
        raise OSError(errno.ENOSPC, "the disk is full")
