"""Reads the history of a run: `events.jsonl` in its folder, one line per event, written by server/events.py."""

from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from panfm.outputs import read_json_lines

FILE = "events.jsonl"


class EventKind(StrEnum):
    """Kinds of events in the history of a run."""

    STARTED = "started"
    RESUMED = "resumed"
    LEFT_OUT = "left-out"
    """A site was asked, and its reply was refused or did not come."""
    AWAY = "away"
    """A site was not asked: it is offline or silent."""
    WAITING = "waiting"
    """The run waits for enough sites."""
    QUORUM = "quorum"
    """There are enough sites again."""
    BACK = "back"
    """A site that was left out or away has answered."""
    FAILED = "failed"
    STOPPED = "stopped"
    FINISHED = "finished"
    BUDGET = "budget"
    """Most of an epsilon is spent."""
    DISK = "disk"
    """A disk is nearly full, or has room again."""
    CERTIFICATE = "certificate"
    """A certificate ends soon, or was renewed."""
    MONITOR = "monitor"
    """A monitor tells that a model goes wrong at a site, or has recovered (server/monitor_faults.py)."""
    MOVED = "moved"
    """A site's name moved to another node."""
    SUPERLINK = "superlink"
    """The SuperLink does not answer, or answers again."""
    WORKER_LOST = "worker-lost"
    """A site's worker went away, or was not there, when it was asked; it came back and answered."""


class Event(BaseModel):
    """One line of the history."""

    model_config = ConfigDict(frozen=True)

    time: str
    """ISO 8601, UTC."""
    run: str | None
    """Id of the run; None before it is known."""
    round: int
    """The round that it is about, or the last one done."""
    kind: EventKind
    site: str | None
    """The site that it is about; None if it is about the run."""
    words: str
    """One line for people."""
    details: dict[str, Any] = {}


def read_events(folder: Path) -> list[Event]:
    """All events of a run, oldest first; none if it has noted none. Raises DataError if the file is damaged."""
    return read_json_lines(folder / FILE, Event.model_validate_json)
