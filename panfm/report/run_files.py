"""Reads a run folder, also that of a run that is still going on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from panfm.config import RunConfig, load_run
from panfm.errors import DataError, one_line
from panfm.evaluate.result import ProbeResult, read_result
from panfm.files import is_locked
from panfm.outputs import read_json_lines
from panfm.report.report_data import Count, Number, ReportData, read_report_data
from panfm.report.run_events import Event, read_events
from panfm.report.run_progress import RunProgress, read_progress
from panfm.report.site_evaluation import SiteEvaluation, read_evaluation


class _SiteLine(BaseModel):
    """Values of one site in one round that a report shows."""

    loss: Number | None = None
    validation_loss: Number | None = None
    seconds: Number | None = None
    saliency: dict[str, Number | None] = {}
    monitors: dict[str, Number | None] = {}
    norms: dict[str, Number | None] = {}
    bytes_down: Count | None = None
    bytes_up: Count | None = None


class _GateLine(BaseModel):
    """Whether a round was kept, in a run with a gate."""

    measure: Number | None = None
    before: Number
    kept: bool
    missing: dict[str, str] = {}


class _RoundLine(BaseModel):
    """Values of one round that a report shows."""

    round: Count
    counts: bool = True
    seconds: Number | None = None
    loss: Number | None = None
    asked: list[str] = []
    sites: dict[str, _SiteLine] = {}
    late: list[str] = []
    rejected: dict[str, str] = {}
    away: dict[str, str] = {}
    moved: dict[str, str] = {}
    epsilon: dict[str, Number | None] = {}
    coverage: dict[str, list[str]] = {}
    profile: dict[str, Number | None] | None = None
    bytes_up: dict[str, Count] = {}
    bytes_down: dict[str, Count] = {}
    gate: _GateLine | None = None
    faults: dict[str, dict[str, str]] = {}


class _Holdings(BaseModel):
    """Streams and subjects of a site's handshake."""

    subjects: Count | None = None
    streams: dict[str, Count | None] = {}


class _SitesFile(BaseModel):
    """The part of sites.json that a report reads."""

    sites: dict[str, _Holdings] = {}
    failed: list[str] = []


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it, for reports."""

    folder: Path
    config: RunConfig
    rounds: tuple[Mapping[str, Any], ...]
    """Lines of rounds.jsonl, by round, of rounds that count; none before the first round ends."""
    sites: Mapping[str, Mapping[str, Any]]
    """Site -> subjects and streams (stream -> subjects), from the handshakes."""
    probe: ProbeResult | None
    """None until the run has been probed."""
    metadata: Mapping[str, Any]
    """Of the final model; empty until there is one."""
    left_out: tuple[str, ...] = ()
    """One line for each that could not take part from the start."""
    is_at_work: bool = False
    """A process is at work in the folder now."""
    ending: str = ""
    """`failed` or `stopped`, if that was written down."""
    failure: str = ""
    """Why the run ended so."""
    progress: RunProgress | None = None
    """The step that it is at; None if nobody is at work, and in a simulation."""
    data: ReportData = field(default_factory=ReportData)
    """Parts of the report that are computed from images; only a simulation writes them."""

    events: tuple[Event, ...] = ()
    """The history of the run, oldest first."""
    uncounted: Mapping[str, Any] = field(default_factory=dict)
    """Line of the round in which the run ended for want of a quorum, if it did."""
    evaluation: SiteEvaluation = field(default_factory=SiteEvaluation)
    """Scores of the model on the sites' own labels, where the coordinator has asked for them."""

    @property
    def is_finished(self) -> bool:
        """Whether there is a final model."""
        return bool(self.metadata)

    @property
    def state(self) -> str:
        """`running`, `finished`, `failed`, `stopped`, `interrupted` (killed), or `not begun`."""
        if self.is_at_work:
            return "running"
        if self.is_finished or self.ending:
            return "finished" if self.is_finished else self.ending
        return "interrupted" if (self.folder / "checkpoint").exists() else "not begun"

    @property
    def site_names(self) -> tuple[str, ...]:
        """All sites that shook hands or answered, in alphabetical order."""
        answered = {site for line in self.rounds for site in line.get("sites", {})}
        return tuple(sorted(answered | set(self.sites)))

    def series(self, site: str, key: str) -> tuple[list[int], list[Any]]:
        """Rounds in which a site reported `key`, and what it reported."""
        reported = [
            (line["round"], line["sites"][site][key])
            for line in self.rounds
            if line.get("sites", {}).get(site, {}).get(key) is not None
        ]
        return [number for number, _ in reported], [value for _, value in reported]

    def bytes_by_group(self, direction: str) -> dict[str, int]:
        """Group -> bytes sent over the whole run; direction is `up` or `down`."""
        total: dict[str, int] = {}
        for line in self.rounds:
            for group, size in line.get(f"bytes_{direction}", {}).items():
                total[group] = total.get(group, 0) + size
        return total


def read_run(folder: Path) -> Run:
    """Read a run folder; a line that is still being written is left out.

    Raises:
        ConfigError: the folder holds no run.toml of ours.
        DataError: another of its files is damaged.
    """
    config = load_run(folder / "run.toml")
    told, ended = _read_sites(folder / "sites.json"), _read_json(folder / "ended.json")
    probe = read_result(folder / "probe.json") if (folder / "probe.json").exists() else None
    is_at_work = is_locked(folder / ".lock")
    rounds = _read_rounds(folder / "rounds.jsonl")
    uncounted = rounds.pop() if rounds and not rounds[-1].get("counts", True) else {}
    return Run(
        folder,
        config,
        tuple(rounds),
        {site: holdings.model_dump() for site, holdings in told.sites.items()},
        probe,
        _read_json(_metadata(folder)),
        left_out=tuple(told.failed),
        is_at_work=is_at_work,
        ending=str(ended.get("state", "")),
        failure=str(ended.get("reason", "")),
        progress=read_progress(folder) if is_at_work else None,
        data=read_report_data(folder),
        events=tuple(read_events(folder)),
        uncounted=uncounted,
        evaluation=read_evaluation(folder),
    )


def _read_sites(path: Path) -> _SitesFile:
    try:
        return _SitesFile.model_validate(_read_json(path), strict=True)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise DataError(f"{path}: {one_line(where)}: not what a run writes there") from error


def _metadata(folder: Path) -> Path:
    return folder / "model" / "metadata.json"


def _read_rounds(path: Path) -> list[Mapping[str, Any]]:
    rounds = {line["round"]: line for line in read_json_lines(path, _round_line)}
    return [rounds[number] for number in sorted(rounds)]


def _round_line(text: bytes) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(text)
    _RoundLine.model_validate(line, strict=True)
    return line


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: found {type(content).__name__}, expected a JSON object")
    return content
