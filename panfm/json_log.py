"""Logs as JSON, one object per line, where the environment says `PANFM_LOG=json`: of the ServerApp and of a worker.

time       ISO 8601, UTC
level      as Python names it: INFO, WARNING, ...
logger     which part of the program
message    one line for people
run        id of the run that has asked a worker
round      number of the round that has ended, or that was asked for
numbers    its numbers by name
error      traceback
"""

import logging
import os
from datetime import UTC, datetime
from typing import Any

from panfm.errors import ConfigError
from panfm.outputs import json_text

VARIABLE = "PANFM_LOG"


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
        content |= {key: getattr(record, key) for key in ("run", "round", "numbers") if hasattr(record, key)}
        if record.exc_info:
            content["error"] = self.formatException(record.exc_info)
        return json_text(content)


def begin_json_log() -> bool:
    """Make all of this process's logs JSON if the environment asks for it; returns whether it does.

    Raises:
        ConfigError: the environment asks for another form.
    """
    form = os.environ.get(VARIABLE, "")
    if form not in ("", "json"):
        raise ConfigError(f"{VARIABLE}={form!r:.40}: expected json, or nothing")
    if form and not any(isinstance(handler.formatter, JsonLines) for handler in logging.root.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(JsonLines())
        logging.root.addHandler(handler)
        logging.root.setLevel(logging.INFO)
    return bool(form)
