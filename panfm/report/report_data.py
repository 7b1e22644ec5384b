"""Reads and writes `report.json` of a run folder: the parts of a report that are computed from patients' images.

```
{"embedding": {"pca": [[x, y]], "explained": [share of the variance, two], "tsne": [[x, y]],      one entry per subject
               "sites": [site, or "held out"], "organs": ["brain, heart"],
               "labels": {label: [0, 1 or null]}},
 "examples":  {"rows": [{"stream", "input", "masked", "prediction": PNG in base64, or null}],
               "hidden": share of the patches, "fitted": subjects behind the read-out, "error": {stream: [ours, mean]}},
 "experts":   {"layer": name, "rows": [{"site", "stream", "shares": [share of each expert]}]},
 "cost":      {"cpu_seconds", "gpu": its name, or null}}
```
Every part may be null. No subject is named.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from panfm.errors import DataError, one_line
from panfm.outputs import write_json
from panfm.texts import read_text

FILE = "report.json"
_MAX_BYTES = 4 << 20

Number = Annotated[float, Field(ge=-1e30, le=1e30)]
"""A finite number, small enough that sums and differences of such numbers are finite too."""
Count = Annotated[int, Field(ge=0, lt=2**63)]
Place = tuple[Number, Number]
Png = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$")]


@dataclass(frozen=True)
class EmbeddingMap:
    """Embeddings of some subjects in two dimensions; all lists have one entry per subject."""

    pca: Sequence[Place]
    explained: Place
    """Shares of the variance that the two principal components explain."""
    tsne: Sequence[Place]
    sites: Sequence[str]
    organs: Sequence[str]
    labels: dict[str, Sequence[int | None]]


def _of_one_length(points: EmbeddingMap) -> EmbeddingMap:
    lists = [points.pca, points.tsne, points.sites, points.organs, *points.labels.values()]
    if len({*map(len, lists)}) > 1:
        raise ValueError("lists of several lengths, expected one entry per subject")
    return points


@dataclass(frozen=True)
class Example:
    """The middle slice of one held-out image: unchanged, with hidden patches, and with the patches predicted."""

    stream: str
    input: Png
    masked: Png
    prediction: Png | None


@dataclass(frozen=True)
class Examples:
    """Example slices, and the errors of predicted patches on held-out patients."""

    rows: Sequence[Example]
    hidden: Number
    """Share of the patches that are hidden."""
    fitted: Count
    """Subjects that the regression from predicted features to pixels was fitted on; 0 without predictions."""
    error: dict[str, Place]
    """Stream -> mean squared errors on hidden patches: of the prediction, and of the fitted subjects' mean patch."""


@dataclass(frozen=True)
class ExpertRow:
    """Share of each expert in the router's gates for a stream's images: at one site, or in the shared model."""

    site: str
    stream: str
    shares: Sequence[Number]


@dataclass(frozen=True)
class ExpertMap:
    """Shares of the experts of one layer, by site and stream."""

    layer: str
    rows: Sequence[ExpertRow]


@dataclass(frozen=True)
class Cost:
    """Processor time of a whole simulation."""

    cpu_seconds: Number
    gpu: str | None


@dataclass(frozen=True)
class ReportData:
    """All parts of `report.json`; None for a part that the run does not have."""

    embedding: Annotated[EmbeddingMap, AfterValidator(_of_one_length)] | None = None
    examples: Examples | None = None
    experts: ExpertMap | None = None
    cost: Cost | None = None


_ADAPTER = TypeAdapter(ReportData)


def write_report_data(folder: Path, data: ReportData) -> None:
    """Write `report.json` into a run folder."""
    write_json(folder / FILE, asdict(data))


def read_report_data(folder: Path) -> ReportData:
    """Read `report.json` of a run folder; all parts are None if the file is absent.

    Raises:
        DataError: the file is not what `write_report_data` writes.
    """
    path = folder / FILE
    if not path.exists():
        return ReportData()
    try:
        return _ADAPTER.validate_python(json.loads(read_text(path, max_bytes=_MAX_BYTES)))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise DataError(f"{path}: {one_line(where)}: not what a simulation writes there") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON of at most {_MAX_BYTES >> 20} MiB") from error
