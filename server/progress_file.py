"""Writes `now.json` into the run folder: the step that the run is at, for `server status` and status.html.

    time           when it was written, ISO 8601, UTC
    step           `handshake`, `round 7`, or the purpose of an exchange of sums
    since          when the step began, or was asked again
    answered       sites that have answered
    waiting-for    sites that have not
    left-out       site -> why it is left out of the step
    waiting        without a quorum: since when, and why

Simulations do not write it: their steps are short.
"""

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panfm.errors import reason
from panfm.outputs import write_json
from panfm.report.run_progress import FILE

if TYPE_CHECKING:
    from server.exchange import Exchange

logger = logging.getLogger(__name__)


class ProgressFile:
    """The file of one run."""

    def __init__(self, folder: Path | None) -> None:
        """Args: folder: The run folder; None: nothing is written."""
        self._path = folder / FILE if folder else None
        self._content: dict[str, Any] = {}

    def begin(self, step: str) -> None:
        """Tell that a step begins, or begins once more."""
        waiting = {"waiting": self._content["waiting"]} if "waiting" in self._content else {}
        self._content = {"step": step, "since": _now(), "answered": [], "waiting-for": [], "left-out": {}} | waiting
        self._write()

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Tell which sites the step does without. Args: reasons: Site -> why."""
        self._content["left-out"] = dict(reasons)
        self._write()

    def follow(self, exchange: "Exchange", names: Mapping[int, str]) -> None:
        """Tell who has answered in an exchange.

        Args:
            names: Node id -> site.
        """
        self._content["answered"] = sorted(names[node] for node in exchange.seconds if node not in exchange.failed)
        self._content["waiting-for"] = sorted(names[node] for node in exchange.waiting_for)
        self._content["left-out"] |= {names[node]: reason for node, reason in exchange.failed.items()}
        self._write()

    def wait(self, why: str) -> None:
        """Tell that the run waits for a quorum."""
        since = self._content.get("waiting", {}).get("since", _now())
        self._content |= {"waiting": {"since": since, "why": why}}
        self._write()

    def go_on(self) -> None:
        """Tell that there is a quorum again."""
        self._content.pop("waiting", None)
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        try:
            write_json(self._path, {"time": _now(), **self._content}, indent=2)
        except OSError as error:
            logger.warning("%s: cannot be written (%s)", self._path.name, reason(error))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
