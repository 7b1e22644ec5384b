"""Data frames of one run folder or of many: what `panfm.runs` returns. Needs the extra `evaluate`."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from panfm.errors import DataError
from panfm.evaluate.result import Score
from panfm.extras import needs_extra
from panfm.notebook.notebook_images import Place
from panfm.report.run_files import Run, read_run

if TYPE_CHECKING:
    import pandas

Row = dict[str, Any]
_SITE_NUMBERS = ("loss", "validation_loss", "seconds", "bytes_up", "bytes_down")


class RunTables(NamedTuple):
    """Three tables; `run` names the run folder in each. Bytes and seconds are of one round."""

    rounds: "pandas.DataFrame"
    """run, round, loss, seconds, sites (that answered), left_out, bytes_up, bytes_down, saliency:<stream>."""
    sites: "pandas.DataFrame"
    """run, round, site, loss, validation_loss, seconds, bytes_up, bytes_down, epsilon, saliency:<stream>."""
    probes: "pandas.DataFrame"
    """run, and the scores of probe.json: arm, group, metric, value, low, high (95 % interval), num_labels."""


def runs(folder: Place) -> RunTables:
    """Read the tables of a run folder, or of all run folders in a folder.

    Raises:
        ConfigError: pandas is not installed, or a run.toml does not hold.
        DataError: no run folder is there, or a file of one is damaged.

    >>> import panfm
    >>> panfm.runs("runs").rounds["loss"].tolist()
    [1.0, 0.5]
    """
    with needs_extra("evaluate"):
        import pandas
    all_runs = [read_run(path) for path in _run_folders(Path(folder))]
    tables = []
    for rows, columns in _TABLES:
        listed = [row for run in all_runs for row in rows(run)]
        tables.append(pandas.DataFrame(listed, columns=None if listed else columns))
    return RunTables(*tables)


def _run_folders(folder: Path) -> list[Path]:
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    folders = [path for path in (folder, *inside) if (path / "rounds.jsonl").exists()]
    if not folders:
        raise DataError(f"{folder}: found no run folder, expected one, or a folder of some")
    return [folder] if folder in folders else folders


def _round_rows(run: Run) -> Iterator[Row]:
    for line in run.rounds:
        yield {
            "run": run.folder.name,
            "round": line["round"],
            "loss": line.get("loss"),
            "seconds": line.get("seconds"),
            "sites": len(line.get("sites", {})),
            "left_out": len(line.get("rejected", {})) + len(line.get("away", {})),
            "bytes_up": sum(line.get("bytes_up", {}).values()),
            "bytes_down": sum(line.get("bytes_down", {}).values()),
            **_saliency(line.get("profile") or {}),
        }


def _site_rows(run: Run) -> Iterator[Row]:
    for line in run.rounds:
        for site, told in line.get("sites", {}).items():
            numbers = {key: told.get(key) for key in _SITE_NUMBERS}
            yield {
                "run": run.folder.name,
                "round": line["round"],
                "site": site,
                **numbers,
                "epsilon": line.get("epsilon", {}).get(site),
                **_saliency(told.get("saliency", {})),
            }


def _probe_rows(run: Run) -> Iterator[Row]:
    for score in run.probe.scores if run.probe else ():
        yield {"run": run.folder.name, **asdict(score)}


def _saliency(shares: Mapping[str, float | None]) -> Row:
    return {f"saliency:{stream}": share for stream, share in shares.items()}


_TABLES = (
    (_round_rows, ["run", "round", "loss", "seconds", "sites", "left_out", "bytes_up", "bytes_down"]),
    (_site_rows, ["run", "round", "site", *_SITE_NUMBERS, "epsilon"]),
    (_probe_rows, ["run", *(part.name for part in fields(Score))]),
)
"""Rows of each table, and its columns where there is no row."""
