"""Progress of a run as records of a log in JSON (panfm/json_log.py)."""

import io
import logging
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from panfm.errors import one_line
from panfm.json_log import begin_json_log
from server.console import Progress
from server.tracking import scalars

logger = logging.getLogger(__name__)


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
    if not begin_json_log():
        return Progress()
    flower = logging.getLogger("flwr")
    flower.handlers, flower.propagate = [], True
    return LoggedProgress()
