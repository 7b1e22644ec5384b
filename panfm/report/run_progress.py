"""Reads `now.json` in a run folder: what the run is doing at the moment, written by server/progress_file.py."""

from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

FILE = "now.json"


class Waiting(BaseModel):
    """A run without a quorum."""

    since: str
    why: str


class RunProgress(BaseModel):
    """The step that a run is at."""

    time: str
    """When this was written; ISO 8601, UTC, as `since`."""
    step: str = "start"
    since: str = ""
    answered: list[str] = []
    waiting_for: list[str] = Field([], alias="waiting-for")
    left_out: dict[str, str] = Field({}, alias="left-out")
    """Site -> why it is left out of the step."""
    waiting: Waiting | None = None

    def lines(self) -> list[str]:
        """Tell it in a few lines."""
        lines = [f"waits for enough sites since {self.waiting.since}: {self.waiting.why}"] if self.waiting else []
        who = [f"{words}: {', '.join(sites)}" for words, sites in self._sites() if sites]
        lines.append("; ".join([f"{self.step}, since {self.since}" if self.since else self.step, *who]))
        return lines + [f"{self.step}: {site} left out: {reason}" for site, reason in sorted(self.left_out.items())]

    def _sites(self) -> list[tuple[str, list[str]]]:
        return [("answered", self.answered), ("waiting for", self.waiting_for)]


def read_progress(folder: Path) -> RunProgress | None:
    """The step that a run is at; None if it tells none."""
    try:
        return RunProgress.model_validate_json((folder / FILE).read_bytes())
    except (OSError, ValidationError):
        return None
