"""CSV tables as a site writes them: a header, then rows; UTF-8, with or without the mark that Excel adds."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from panfm.errors import DataError

Line = tuple[int, dict[str, str]]
"""Line number, counted from 1, and the stripped cells by column."""


def read_table(
    path: Path, needed: Sequence[str], optional: Sequence[str] | None = None, *, delimiter: str = ","
) -> tuple[list[str], list[Line]]:
    """Columns and rows of a CSV file; blank lines are skipped.

    Args:
        path: The file.
        needed: Columns it must have.
        optional: Columns it may have besides; any when None.
        delimiter: Between cells.
    Raises:
        DataError: what is wrong, without the path.
    """
    columns, rows = _cells(path, delimiter)
    missing = [name for name in needed if name not in columns]
    if missing:
        raise DataError(f"no column {', '.join(missing)}")
    allowed = columns if optional is None else [*needed, *optional]
    for name in columns:
        if name not in allowed or not name:
            raise DataError(f"unknown column {name!r}, known: {', '.join(allowed)}")
        if columns.count(name) > 1:
            raise DataError(f"column {name!r} twice")
    for line, cells in rows:
        if len(cells) != len(columns):
            raise DataError(f"{len(cells)} cells on line {line} under {len(columns)} columns")
    return columns, [(line, dict(zip(columns, cells, strict=True))) for line, cells in rows]


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write what `read_table` reads."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _cells(path: Path, delimiter: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, delimiter=delimiter)
            rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except FileNotFoundError as error:
        raise DataError("no such file") from error
    except csv.Error as error:
        raise DataError(f"no UTF-8 CSV file ({error})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"no UTF-8 CSV file ({type(error).__name__})") from error
    return (rows[0][1] if rows else []), rows[1:]
