"""Results of probing, and their file `probe.json`.

```
{"scores":  [{"arm", "group", "metric": "auc"|"r2", "value", "low", "high", "num_labels"}],
 "missing": {arm: {"auc", "auc_missing_1", ..., "auc_drop_<organ>", "auc_only_<organ>", "auc_no_dominant"}},
 "balance": {arm: {"effective_rank"}},
 "subjects": {"fit", "test"}, "notes": [line],
 "streams": {arm: {stream: AUC of a probe on this stream alone}},
 "few_labels": {arm: {"auc_<n>": mean AUC of probes fitted on n patients}},
 "labels":  [a score for each label: {"arm", "group": the label, "metric", "value", "low", "high", "num_labels": 1}],
 "known":   {label: {"fit", "test"}},                      subjects for whom a label is known
 "task":    [a score of each model that has learned the run's [task]: {"arm", "group", "metric", ...}],
 "leakage": [{"arm", "kind": "presence"|"site", "metric", "value", "low", "high", "chance"}],
 "benefit": [a score of each model that a site could keep, on its own patients: {"arm", "group", "metric", ...}],
 "unmatched": {place: {"without_row", "without_images"}}}  subjects on one side of a label table only
```
`group` is a group of labels (`all`, `weak`, `category`, `disease`) or, for a number, the label itself; of `task` it is
`holdout`, or the site (`site:<name>`) whose patients outside training are scored, the metric is auc, accuracy, r2 or
mae, and arms that end in ` minus own`, of `benefit` as well, are differences to the site's own model. Intervals are
95 % bootstrap over test subjects. What cannot be told is null.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from panfm.errors import DataError, reason
from panfm.outputs import write_json

HOLDOUT = "holdout"
"""Group of a task's scores on the held-out patients."""
PERSONALISED = "personalised"
"""Arm of a task: the federated model after more steps on a site's own labels."""
ENSEMBLE = "ensemble"
"""Arm of a site: the mean of what the federated and the site's own model predict."""
GAIN = " minus own"
"""Suffix of an arm: how much better it is than the site's own model, on the same patients."""


@dataclass(frozen=True)
class Interval:
    """A point estimate and its 95 % bootstrap interval; NaN where it cannot be told."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """One score of one arm, with its interval."""

    arm: str
    """federated, site:<name>, untrained, statistics, federated-probe, local-probe, ..."""
    group: str
    metric: str
    value: float
    low: float
    high: float
    num_labels: int

    @classmethod
    def of(cls, arm: str, group: str, metric: str, estimate: Interval, num_labels: int) -> "Score":
        """Make a score from an interval."""
        return cls(arm, group, metric, estimate.value, estimate.low, estimate.high, num_labels)


@dataclass(frozen=True)
class Leakage:
    """How much an arm's embedding says only of organs present, or of a patient's site (leakage.py)."""

    arm: str
    kind: Literal["presence", "site"]
    metric: str
    """variance, auc, accuracy, accuracy-of-presence"""
    value: float
    low: float
    high: float
    chance: float
    """The value of an embedding that says nothing of it."""

    @classmethod
    def of(
        cls, arm: str, kind: Literal["presence", "site"], metric: str, estimate: Interval, chance: float
    ) -> "Leakage":
        """Make a score from an interval."""
        return cls(arm, kind, metric, estimate.value, estimate.low, estimate.high, chance)


@dataclass(frozen=True)
class ProbeResult:
    """All results of the probes of one run."""

    scores: tuple[Score, ...]
    missing: Mapping[str, Mapping[str, float]]
    balance: Mapping[str, Mapping[str, float]]
    subjects: Mapping[str, int]
    notes: tuple[str, ...] = ()
    streams: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    few_labels: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    labels: tuple[Score, ...] = ()
    """Every label by itself; `group` is the label."""
    known: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    unmatched: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    task: tuple[Score, ...] = ()
    """Predictions of the run's `[task]`, by the head that learned it."""
    leakage: tuple[Leakage, ...] = ()
    benefit: tuple[Score, ...] = ()
    """Linear probes of the models that a site could keep, on its own patients; `group` is `site:<name>`."""

    def find(self, arm: str, group: str, metric: str) -> Score | None:
        """One cell of the table; None when it was not measured."""
        wanted = (arm, group, metric)
        return next((score for score in self.scores if (score.arm, score.group, score.metric) == wanted), None)

    def value(self, arm: str, group: str = "all", metric: str = "auc") -> float:
        """One score's point estimate; NaN when it was not measured."""
        score = self.find(arm, group, metric)
        return score.value if score else math.nan


def write_result(path: Path, result: ProbeResult) -> None:
    """Write `probe.json`."""
    write_json(path, asdict(result), indent=1)


def read_result(path: Path) -> ProbeResult:
    """Read `probe.json`.

    Raises:
        DataError: the file is absent or not what `write_result` writes.
    """
    try:
        return TypeAdapter(ProbeResult).validate_python(_with_nan(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a probe result written by a run ({reason(error)})") from error


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_nan(inner) for inner in value]
    return math.nan if value is None else value
