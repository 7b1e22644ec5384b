"""Writes files for commands and servers: new folders, JSON, JSON lines, tables. A site's worker does not import it."""

import csv
import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from panfm.errors import DataError, reason
from panfm.files import sync, write_atomic


def write_json(path: Path, content: object, *, indent: int | None = None) -> None:
    """Write a value as a whole file of JSON; see `open_atomic` and `json_text`."""
    write_atomic(path, f"{json_text(content, indent=indent)}\n".encode())


def json_text(content: object, *, indent: int | None = None) -> str:
    """Write a value as JSON; numbers that are not finite, which JSON lacks, become null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def append_json_line(path: Path, content: object) -> None:
    """Add a line to a file of JSON lines and wait until it is on the disk; numbers that are not finite become null."""
    with path.open("ab") as file:
        file.write(f"{json_text(content)}\n".encode())
        sync(file)


def read_json_lines(path: Path, parse: Callable[[bytes], Any] = json.loads) -> list[Any]:
    """Read the values of a file of JSON lines; none if there is no such file.

    A last line without its end was cut short by a crash, or is still being written: it is left out.

    Args:
        parse: Makes the value of a line, and raises ValueError for one that does not hold.
    Raises:
        DataError: the file cannot be read, or one of its lines does not hold.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from error
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(parse(line))
        except (ValueError, RecursionError) as error:
            start = line.decode(errors="replace")[:40]
            raise DataError(f"{path}:{number}: found {start!r}, expected one JSON object per line") from error
    return values


def check_place(path: Path) -> None:
    """Raise OSError if nothing can be made at a path, or written into the folder that is there."""
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    code = 0 if os.access(nearest, os.W_OK | os.X_OK) else errno.EACCES
    if code := code if nearest.is_dir() else errno.ENOTDIR:
        raise OSError(code, os.strerror(code))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Make a folder that appears complete or not at all: yields a temporary folder and renames it after the block.

    Guarantees:
        alone: two processes that make the same folder do not meet; the one that ends second leaves the first's folder.

    Raises:
        DataError: it exists already, or the block met an error of the file system.
    """
    try:
        if folder.exists():
            raise DataError(f"{folder}: exists already, expected a new folder")
        partial = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        partial.mkdir(parents=True)
        try:
            yield partial
            _take_name(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error})") from error


def _take_name(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table as CSV with a header, as `panfm.data.tables` reads it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
