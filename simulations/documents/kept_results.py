"""Reads the result files of studies that are kept in docs/results/data, and writes their numbers as the pages do."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_OF_DRAW = 100
"""More than any seed that is reported."""


@dataclass(frozen=True)
class KeptTarget:
    """A number that a study was asked to show, of at least a certain size, and what it showed."""

    claim: str
    value: float
    least: float
    is_met: bool


@dataclass(frozen=True)
class KeptResult:
    """Measurements of a study, by metric, arm and seed."""

    commit: str
    values: dict[tuple[str, str], dict[int, float]]
    """(metric, arm) -> seed -> value; arms may have different seeds. A metric that was measured in several places is
    `<place>/<metric>`."""
    targets: tuple[KeptTarget, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "KeptResult":
        """Read a result file, as `StudyResult.write` wrote it. Rows without `seeds` have those of `config.pairs`, which
        is a list of (draw, seed); where there are several draws, seed 3 of draw 2 is 203. Raises ValueError for a
        pair that stands twice."""
        table = json.loads(path.read_text(encoding="utf-8"))
        pairs = [(int(draw), int(seed)) for draw, seed in table.get("config", {}).get("pairs", [])]
        paired = [seed for _, seed in pairs]
        if len({*paired}) < len(pairs):
            paired = [_OF_DRAW * draw + seed for draw, seed in pairs]
        if len({*paired}) < len(pairs):
            raise ValueError(f"{path}: a pair of draw and seed stands twice, expected once")
        values = {
            (_metric(row), row["arm"]): {
                seed: math.nan if value is None else float(value)
                for seed, value in zip(row.get("seeds", paired), row["values"], strict=True)
            }
            for row in table["results"]
        }
        targets = tuple(
            KeptTarget(row["claim"], math.nan if row["found"] is None else row["found"], row["at_least"], row["met"])
            for row in table.get("targets", [])
        )
        return cls(str(table["commit"]), values, targets)

    @property
    def arms(self) -> list[str]:
        """All arms, in the file's order."""
        return list(dict.fromkeys(arm for _, arm in self.values))

    @property
    def metrics(self) -> list[str]:
        """All metrics, in the file's order."""
        return list(dict.fromkeys(metric for metric, _ in self.values))

    def seeds(self, *arms: str) -> list[int]:
        """Seeds with which all of some arms were measured; all seeds without arms."""
        by_arm = {arm: {seed for (_, other), by_seed in self.values.items() if other == arm for seed in by_seed}
                  for arm in arms or self.arms}  # fmt: skip
        return sorted(set.intersection(*by_arm.values()) if arms else set.union(*by_arm.values()))

    def of(self, metric: str, arm: str) -> list[float]:
        """Values of one metric and arm, by seed; empty if it was not measured."""
        return [value for _, value in sorted(self.values.get((metric, arm), {}).items())]

    def gains(self, metrics: Sequence[str], arm: str, baseline: str) -> NDArray[np.float64]:
        """Arm minus baseline [metrics, seeds], over the seeds that all metrics of both have; metrics that one lacks are
        left out."""
        known = [metric for metric in metrics if {(metric, arm), (metric, baseline)} <= {*self.values}]
        measured = [{*self.values[metric, name]} for metric in known for name in (arm, baseline)]
        seeds = sorted({*self.seeds(arm, baseline)}.intersection(*measured))
        differences = [
            [self.values[metric, arm][seed] - self.values[metric, baseline][seed] for seed in seeds] for metric in known
        ]
        return np.array(differences).reshape(len(known), len(seeds))


def _metric(row: Mapping[str, Any]) -> str:
    return f"{row['of']}/{row['metric']}" if "of" in row else str(row["metric"])


def short(value: float, digits: int = 3) -> str:
    """Write a number without the zero before its point: .677, 1.000, -.020."""
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"


def signed(value: float, digits: int = 3) -> str:
    """Write a difference: +.043, -.020."""
    return f"{'-' if value < 0 else '+'}{short(abs(value), digits)}"


def with_spread(values: Sequence[float]) -> str:
    """Write mean ± standard deviation, without a spread below .0005; empty without values."""
    if not values:
        return ""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return short(float(np.mean(values))) + (f" ± {short(spread)}" if spread >= 0.0005 else "")


def by_seed(values: Sequence[float] | NDArray[np.float64], digits: int = 3) -> str:
    """Write one difference per seed."""
    return " ".join(signed(float(value), digits) for value in values)
