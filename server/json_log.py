"""Logs of the ServerApp as JSON, one object per line, where the environment says `PANFM_LOG=json`.

time       ISO 8601, UTC
level      as Python names it: INFO, WARNING, ...
logger     which part of the program
message    one line for people
round      number of the round that has ended
numbers    its numbers by name, as the loggers of `[tracking]` get them
error      traceback
"""

import io
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from panfm.errors import ConfigError, one_line
from panfm.outputs import json_text
from server.console import Progress
from server.tracking import scalars

VARIABLE = "PANFM_LOG"
logger = logging.getLogger(__name__)


class JsonLines(logging.Formatter):
    """Makes a line of JSON of each record."""

    def format(self, record: logging.LogRecord) -> str:
        """The record in one line."""
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage().strip(),
        }
        content |= {key: getattr(record, key) for key in ("round", "numbers") if hasattr(record, key)}
        if record.exc_info:
            content["error"] = self.formatException(record.exc_info)
        return json_text(content)


class LoggedProgress(Progress):
    """Progress of a run as records of the log; a round that has ended is one record with its numbers."""

    def __init__(self) -> None:
        super().__init__(Console(file=_LoggedLines(), soft_wrap=True, highlight=False, no_color=True))

    def round(self, num_rounds: int, line: Mapping[str, Any]) -> None:
        """Log how a round went; sites that it left out are records of their own (rounds.py)."""
        loss = "-" if line["loss"] is None else f"{line['loss']:.4f}"
        words = f"round {line['round']}/{num_rounds}: loss {loss}, {len(line['sites'])} sites, {line['seconds']:.1f} s"
        logger.info(words, extra={"round": line["round"], "numbers": dict(scalars(line))})
        if gate := line.get("gate"):
            self._gate(line["round"], gate)
        self._faults(line)
        for site, reason in [*line.get("away", {}).items(), *line.get("moved", {}).items()]:
            self._note(f"round {line['round']}: {site} {reason}")

    def _note(self, words: str) -> None:
        logger.warning("%s", one_line(words))


class _LoggedLines(io.StringIO):
    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                logger.info("%s", one_line(line))
        return len(text)


def progress_of_environment() -> Progress:
    """How the ServerApp tells of its progress; where JSON is asked for, all of this process's logs become JSON.

    Raises:
        ConfigError: the environment asks for another form.
    """
    form = os.environ.get(VARIABLE, "")
    if form not in ("", "json"):
        raise ConfigError(f"{VARIABLE}={form!r:.40}: expected json, or nothing")
    if not form:
        return Progress()
    if not any(isinstance(handler.formatter, JsonLines) for handler in logging.root.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(JsonLines())
        logging.root.addHandler(handler)
        logging.root.setLevel(logging.INFO)
        flower = logging.getLogger("flwr")
        flower.handlers, flower.propagate = [], True
    return LoggedProgress()
