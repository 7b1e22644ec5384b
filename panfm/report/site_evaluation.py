"""Scores of a run's model on the sites' own labels, and their file `evaluation.json` in the run folder.

```
{"columns": {column: {"sites": {site: {"metric": "auc"|"r2", "value", "low", "high", "patients", "held_out"}},
                      "left_out": {site: reason}}},
 "failure": why the last evaluation ended without scores; empty if it has not}
```
"""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from panfm.errors import DataError, reason
from panfm.outputs import write_json

FILE = "evaluation.json"
_Part = Annotated[float, Field(ge=-1.0, le=1.0)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SiteResult(_Strict):
    """Score of one site's patients: AUC or R2, and its 95 % interval."""

    metric: Literal["auc", "r2"]
    value: _Part
    low: _Part
    high: _Part
    patients: Annotated[int, Field(gt=0, le=1_000_000_000)]
    held_out: bool
    """Whether they are held out from training; else they were scored by cross-validation."""


class ColumnScores(_Strict):
    """Scores of all sites on one column of labels."""

    sites: dict[str, SiteResult] = {}
    """Site -> its score, sorted by site name."""
    left_out: dict[str, str] = {}
    """Site without a score -> the reason."""


class SiteEvaluation(_Strict):
    """Scores on all columns that the coordinator has asked for."""

    columns: dict[str, ColumnScores] = {}
    failure: str = ""
    """Why the last evaluation ended without scores."""

    def only(self, columns: Collection[str]) -> "SiteEvaluation":
        """The scores on some columns."""
        return SiteEvaluation(columns={name: scores for name, scores in self.columns.items() if name in columns})

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of a table: column, site, score with its interval, patients, and how they were scored."""
        return [
            (
                column,
                site,
                f"{score.metric.upper()} {score.value:.2f} [{score.low:.2f}, {score.high:.2f}]",
                str(score.patients),
                "held out" if score.held_out else "cross-validation",
            )
            for column, scores in self.columns.items()
            for site, score in scores.sites.items()
        ]

    def left_out(self) -> list[str]:
        """One line for each site without a score on a column."""
        told = [(column, scores.left_out) for column, scores in self.columns.items()]
        return [f"{column}: {site}: {reason}" for column, sites in told for site, reason in sites.items()]


def write_evaluation(folder: Path, evaluation: SiteEvaluation) -> None:
    """Write `evaluation.json` into a run folder."""
    write_json(folder / FILE, evaluation.model_dump(), indent=2)


def read_evaluation(folder: Path) -> SiteEvaluation:
    """Read `evaluation.json` of a run folder; empty if there is none. Raises DataError if it is damaged."""
    path = folder / FILE
    try:
        return SiteEvaluation.model_validate_json(path.read_bytes()) if path.exists() else SiteEvaluation()
    except (OSError, ValidationError) as error:
        raise DataError(f"{path}: not what an evaluation writes there ({reason(error)})") from error
