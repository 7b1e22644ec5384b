"""CSV tables as a site writes them: a header, then rows; UTF-8, with or without the mark that Excel adds."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from panfm.errors import DataError, reason

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", ":": "colons"}
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
    columns, rows = _cells(path, needed, delimiter)
    missing = [name for name in needed if name not in columns]
    if missing:
        hint = _separator_hint(columns, needed) or (f", found {', '.join(columns):.80}" if columns else "")
        raise DataError(f"no column {', '.join(missing)}{hint}")
    allowed = columns if optional is None else [*needed, *optional]
    for number, name in enumerate(columns, start=1):
        if not name:
            raise DataError(f"no name over column {number} of {len(columns)} (a column too many?)")
        if name not in allowed:
            raise DataError(f"unknown column {name!r}, known: {', '.join(allowed)}")
        if columns.count(name) > 1:
            raise DataError(f"column {name!r} twice")
    for line, cells in rows:
        if len(cells) != len(columns):
            hint = " (a comma in a number, or in a text without quotes?)" if len(cells) > len(columns) else ""
            raise DataError(f"{len(cells)} cells on line {line} under {len(columns)} columns{hint}")
    return columns, [(line, dict(zip(columns, cells, strict=True))) for line, cells in rows]


def _separator_hint(columns: Sequence[str], needed: Sequence[str]) -> str:
    """Name the separator of a table that has other ones than commas."""
    header = ",".join(columns)
    for separator, name in _SEPARATORS.items():
        cells = {cell.strip(' "') for cell in header.split(separator)}
        if (separator in header and {*needed} <= cells) or header == f"sep={separator}":
            return f" (cells separated by {name}; save it with commas, and points in numbers)"
    return ""


def _cells(path: Path, needed: Sequence[str], delimiter: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    try:
        content = path.read_bytes()
        if content.startswith(_UTF16) or b"\0" in content[:2]:
            raise DataError("no UTF-8 CSV file (it is UTF-16; save it as CSV UTF-8)")
        with io.StringIO(content.decode("utf-8-sig"), newline="") as file:
            reader = csv.reader(file, strict=True, delimiter=delimiter)
            rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except FileNotFoundError as error:
        raise DataError("no such file") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"byte {content[error.start]:#x} on line {line}"
        raise DataError(f"no UTF-8 CSV file ({byte}; save it as CSV UTF-8)") from error
    except csv.Error as error:
        hint = _separator_hint([content.partition(b"\n")[0].decode("utf-8-sig").strip()], needed)
        raise DataError(f"no UTF-8 CSV file ({error}){hint}") from error
    except OSError as error:
        raise DataError(f"no UTF-8 CSV file ({reason(error)})") from error
    return (rows[0][1] if rows else []), rows[1:]
