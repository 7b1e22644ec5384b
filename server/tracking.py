"""Status page and TensorBoard events of a run, kept in the run folder while it goes on.

It is made from rounds.jsonl, so a resumed run shows every round once. Nothing in a run depends on it: a disk that does
not take it is a line in the log.
"""

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar, text

from panfm.errors import PanfmError
from panfm.privacy.guarantees import privacy_label
from panfm.report.status_page import write_status
from server.run_folder import RunFolder

logger = logging.getLogger(__name__)
_PAGE_EVERY_S = 5.0
"""Rounds of a simulation may take milliseconds; nobody sees that many pages. Those of real sites take longer."""


class Tracking:
    """Status page and events of one run; a context that closes the events file at its end."""

    def __init__(self, folder: RunFolder) -> None:
        """Write events and page anew, with the rounds done before."""
        self._folder = folder
        self._events: EventsWriter | None = None
        self._page_at = 0.0
        try:
            self._begin_events()
        except OSError as error:
            logger.warning("tensorboard: cannot be written (%s)", error.strerror)
        self._refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._events:
            with suppress(OSError):
                self._events.close()

    def round(self, line: Mapping[str, Any]) -> None:
        """Add a round that has ended."""
        if self._events:
            try:
                self._add(line)
                self._events.flush()
            except OSError as error:
                logger.warning("round %s: tensorboard: cannot be written (%s)", line["round"], error.strerror)
        if time.monotonic() - self._page_at >= _PAGE_EVERY_S:
            self._refresh()

    def _refresh(self) -> None:
        refresh_page(self._folder.path)
        self._page_at = time.monotonic()

    def _begin_events(self) -> None:
        folder = self._folder.path / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._events = EventsWriter(str(folder / "events"))
        # A TensorBoard that has read the file before forgets what it held.
        restart = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=time.time(), step=0, session_log=restart))
        if (label := privacy_label(self._folder.run)) != "none":
            self._events.write_event(Event(wall_time=time.time(), step=0, summary=text("privacy", label)))
        for line in self._folder.rounds():
            self._add(line)
        self._events.flush()

    def _add(self, line: Mapping[str, Any]) -> None:
        assert self._events
        for name, value in scalars(line):
            self._events.write_event(Event(wall_time=time.time(), step=line["round"], summary=scalar(name, value)))


def refresh_page(run_dir: Path) -> None:
    """Write status.html anew."""
    try:
        write_status(run_dir)
    except (OSError, PanfmError) as error:
        logger.warning("status.html: cannot be written: %s", error)


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield name and value of all numbers in a round's line; those that are null are left out."""
    values = {
        "loss/federation": line["loss"],
        "round/seconds": line["seconds"],
        "round/sites": len(line["sites"]),
        "round/left-out": len(line["rejected"]) + len(line.get("away", {})),
        "bytes/up": sum(line["bytes_up"].values()),
        "bytes/down": sum(line["bytes_down"].values()),
        **{f"saliency/{stream}": share for stream, share in (line["profile"] or {}).items()},
        **{f"coverage/{stream}": len(sites) for stream, sites in line["coverage"].items()},
        **{f"epsilon/{site}": cost for site, cost in line.get("epsilon", {}).items()},
        **({"gate/measure": gate["measure"], "gate/kept": int(gate["kept"])} if (gate := line.get("gate")) else {}),
    }
    for site, reply in line["sites"].items():
        values |= {f"loss/{site}": reply["loss"], f"validation-loss/{site}": reply["validation_loss"]}
        values |= {f"seconds/{site}": reply["seconds"]}
    yield from ((name, float(value)) for name, value in values.items() if value is not None)
