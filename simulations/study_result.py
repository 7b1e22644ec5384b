"""The result of a study or bench: measurements by metric and arm, answers and targets, and the file they go to."""

import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panfm.outputs import write_json


@dataclass(frozen=True)
class Target:
    """A number that a study was asked to show, of at least a certain size."""

    claim: str
    value: float
    least: float

    @property
    def is_met(self) -> bool:
        """False for NaN."""
        return self.value >= self.least

    def __str__(self) -> str:
        verdict = "met" if self.is_met else "MISSED"
        return f"target {verdict}: {self.claim} is {self.value:+.4f}, wanted at least {self.least:+.4g}"


@dataclass
class StudyResult:
    """Measurements of a study, by metric and arm."""

    name: str
    config: dict[str, Any]
    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """(metric, arm) -> one value per pair, in the order of the pairs. A metric measured in several places is written
    `<place>/<metric>`: `lasting/auc`, `neuro-centre/auc`."""
    ratios: dict[str, float] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    unit: str = "1"

    def add(self, arm: str, measured: Mapping[str, float]) -> None:
        """Append one job's measurements; call in the order of the pairs."""
        for metric, value in measured.items():
            self.values.setdefault((metric, arm), []).append(float(value))

    def mean(self, metric: str, arm: str) -> float:
        """Mean over the pairs."""
        return float(np.mean(self.values[metric, arm]))

    def gain(self, metric: str, arm: str, baseline: str) -> list[float]:
        """Arm minus baseline, pair by pair."""
        pairs = zip(self.values[metric, arm], self.values[metric, baseline], strict=True)
        return [mine - other for mine, other in pairs]

    def share_won(self, metric: str, arm: str, baseline: str) -> float:
        """Share of the pairs in which the arm is ahead."""
        return float(np.mean(np.array(self.gain(metric, arm, baseline)) > 0))

    def add_gain(
        self, metric: str, arm: str, baseline: str, *, with_share: bool = True, with_interval: bool = False
    ) -> None:
        """Add the ratio `<metric>/<arm>-minus-<baseline>`, the mean difference over the pairs.

        Args:
            with_share: Add `<metric>/<arm>-at-least-<baseline>`, the share of pairs in which the arm is not behind.
            with_interval: Add `.../half-interval`, half of the mean's 95 % interval.
        """
        gain = np.array(self.gain(metric, arm, baseline))
        name = f"{metric}/{arm}-minus-{baseline}"
        self.ratios[name] = float(gain.mean())
        if with_interval:
            self.ratios[f"{name}/half-interval"] = half_interval(gain)
        if with_share:
            self.ratios[f"{metric}/{arm}-at-least-{baseline}"] = float((gain >= 0).mean())

    def median_ratio(self, metric: str, arm: str, baseline: str) -> float:
        """Median over the pairs of arm over baseline."""
        return float(np.median(np.array(self.values[metric, arm]) / np.array(self.values[metric, baseline])))

    def write(self, path: Path) -> None:
        """Write the result file, with null for NaN.

        ```
        {"name", "config", "commit",
         "results": [{"metric", "of": place, if any, "arm", "values": [one per pair], "mean", "sd", "n", "unit"}],
         "ratios": {name: number},
         "targets": [{"claim", "found", "at_least", "met"}]}
        ```
        """
        targets = [
            {"claim": target.claim, "found": target.value, "at_least": target.least, "met": target.is_met}
            for target in self.targets
        ]
        table: dict[str, Any] = {"name": self.name, "config": without_folders(self.config), "commit": commit()}
        table["results"] = [self._row(metric, arm, values) for (metric, arm), values in self.values.items()]
        table |= {"ratios": self.ratios, "targets": targets}
        write_json(path, table, indent=1)
        kept_jobs(path).unlink(missing_ok=True)

    def _row(self, metric: str, arm: str, values: list[float]) -> dict[str, Any]:
        place, _, own = metric.rpartition("/")
        return {
            "metric": own,
            **({"of": place} if place else {}),
            "arm": arm,
            "values": values,
            "mean": float(np.mean(values)),
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
            "n": len(values),
            "unit": self.unit,
        }


def without_folders(config: Any) -> Any:
    """Cut absolute paths of a study's description, such as that of a start model, to the names of the files."""
    if isinstance(config, Mapping):
        return {name: without_folders(value) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [without_folders(value) for value in config]
    return Path(config).name if isinstance(config, Path | str) and Path(config).is_absolute() else config


def half_interval(values: Sequence[float] | NDArray[np.float64]) -> float:
    """Half of the 95 % interval of a mean, by Student's t; NaN for a single value."""
    from scipy import stats

    if len(values) < 2:
        return math.nan
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))


@cache
def commit() -> str:
    """Commit of the source tree when first asked, with `-dirty` when it has been changed since; `unknown` outside a git
    checkout."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def kept_jobs(path: Path) -> Path:
    """Where an interrupted study keeps the results of its jobs until its result file is written."""
    return path.with_name(f"{path.name}.jobs")
