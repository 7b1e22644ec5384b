"""The manifest of a site: one row per subject, session and stream.

Columns `subject,stream,path` and optionally `split` (train, val or test; train when empty), `mask` and `session` (a
visit of the subject; of subjects with one visit it may be empty). Paths are absolute, or relative to the manifest's
folder, and name a file or a folder that one of the readers accepts. Rows that `quarantine.csv` lists are left out; that
file is written by `panfm site check --quarantine`. It knows a row by subject and stream, and by its path or, where
another path has it now, the content of its image.
"""

import os.path
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from panfm.anatomy import parse_stream
from panfm.config import SiteConfig, site_path
from panfm.data.subjects import SHORTENED, is_shortened, subject_key
from panfm.data.tables import read_table
from panfm.errors import DataError

SPLITS = ("train", "val", "test")
QUARANTINE = "quarantine.csv"
"""In the site folder: rows to leave out, each with the reason."""
_NEEDED = ("subject", "stream", "path")
_OPTIONAL = ("split", "mask", "session")
_MOST_FAULTS = 10
COLUMNS = (*_NEEDED, *_OPTIONAL)
"""Of a manifest, in their usual order."""


@dataclass(frozen=True, slots=True)
class Row:
    """One image of one subject, as the manifest writes it."""

    line: int
    """Line of the manifest, counted from 1."""
    subject: str
    stream: str
    path: str
    split: str = "train"
    mask: str = ""
    """Empty when there is none."""
    session: str = ""
    """Visit of the subject; a subject is one patient, whatever the number of its sessions."""


@dataclass(frozen=True)
class Fault:
    """A fault of one row, or of the manifest as a whole."""

    file: str
    given: str
    expected: str
    row: Row | None = None
    """The row it condemns; none when it condemns the whole manifest."""

    def __str__(self) -> str:
        """One line; what would steer a terminal is spelled out."""
        line = " ".join(f"{self.file}: found {self.given}, expected {self.expected}".split())
        return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def read_manifest(folder: Path, site: SiteConfig) -> tuple[Row, ...]:
    """Rows of a site's manifest, less the quarantined ones.

    Raises:
        DataError: the table does not hold; one line per fault, each with file and line number, up to ten of them.
    """
    rows, faults = scan_manifest(folder, site, with_quarantine=True)
    if faults:
        place = site_path(folder, site.manifest).parent
        lines = [f"{place}/{fault}" for fault in faults[:_MOST_FAULTS]]
        more = len(faults) - _MOST_FAULTS
        raise DataError("\n".join([*lines, *([f"and {more} more; panfm site check {folder}"] if more > 0 else [])]))
    return rows


def scan_manifest(
    folder: Path, site: SiteConfig, *, with_quarantine: bool = False
) -> tuple[tuple[Row, ...], tuple[Fault, ...]]:
    """Sound rows and faults of a manifest. Of two rows that conflict, the later is at fault.

    Args:
        with_quarantine: Whether to leave out the rows that `quarantine.csv` lists; an image is opened only to look for
            one whose path has gone. Raises DataError: the list does not hold.
    """
    path = site_path(folder, site.manifest)
    try:
        rows = parse_manifest(folder, site)
    except DataError as error:
        return (), (Fault(path.name, str(error), f"a table of {','.join(_NEEDED)}"),)
    if with_quarantine and (folder / QUARANTINE).exists():
        from panfm.data.left_out import without_listed  # few sites have a list

        rows = without_listed(rows, folder / QUARANTINE, lambda row: image_path(folder, site, row.path))
    if not rows:
        return (), (Fault(path.name, "no rows", "one row per subject and stream"),)
    complaints = _Complaints()
    faults = [Fault(f"{path.name}:{row.line}", *complaint, row) for row in rows if (complaint := complaints(row))]
    condemned = {fault.row for fault in faults}
    return tuple(row for row in rows if row not in condemned), tuple(faults)


def image_path(folder: Path, site: SiteConfig, relative: str) -> Path:
    """A path named in the manifest."""
    return site_path(folder, site.manifest).parent / relative


Complaint = tuple[str, str]
"""Description of a faulty entry, and of a sound one, for `found ..., expected ...`."""


class _Complaints:
    """Finds the fault of a row, by itself or beside the rows before it."""

    def __init__(self) -> None:
        self._images: dict[tuple[str, str, str], int] = {}
        self._paths: dict[str, int] = {}
        self._splits: dict[str, str] = {}
        self._spelled: dict[str, Row] = {}

    def __call__(self, row: Row) -> Complaint | None:
        checks: tuple[Callable[[Row], Complaint | None], ...] = (_alone, self._repeated, self._split)
        return next((complaint for check in checks if (complaint := check(row))), None)

    def _repeated(self, row: Row) -> Complaint | None:
        key = subject_key(row.subject)
        if (spelled := self._spelled.setdefault(key, row)).subject != row.subject:
            again = f"subject {row.subject!r}, which line {spelled.line} spells {spelled.subject!r}"
            return again, "one spelling of a subject, or identifiers that differ in more than case and leading zeros"
        first = self._images.setdefault((key, row.session, row.stream), row.line)
        if first != row.line:
            given = f"subject {row.subject!r} with {row.stream} again (line {first})"
            remedy = "a column session for a further visit, or a suffix as in brain-mr.t1 for another kind of image"
            return given, f"one row per subject and stream; {remedy}"
        first = self._paths.setdefault(os.path.normpath(row.path), row.line)
        if first != row.line:
            return f"file {row.path!r} again (line {first})", "a file of its own"
        return None

    def _split(self, row: Row) -> Complaint | None:
        first = self._splits.setdefault(row.subject, row.split)
        if first != row.split:
            return f"subject {row.subject!r} in split {row.split} and in {first}", "one split per subject"
        return None


def _alone(row: Row) -> Complaint | None:
    for name in _NEEDED:
        if not getattr(row, name):
            return f"no {name}", f"a {name}"
    if is_shortened(row.subject):
        return f"subject {row.subject!r}", SHORTENED
    if row.split not in SPLITS:
        return f"split {row.split!r}", " or ".join(SPLITS)
    try:
        parse_stream(row.stream)
    except ValueError:
        return (
            f"unknown stream {row.stream!r}",
            "<organ>-<modality> with a known modality, e.g. brain-mr, or brain-mr.t1 with a suffix",
        )
    return None


def parse_manifest(folder: Path, site: SiteConfig) -> list[Row]:
    """Rows of a manifest, sound or not. Raises DataError: it is no table; the text does not name it."""
    _, lines = read_table(site_path(folder, site.manifest), _NEEDED, _OPTIONAL)
    rows = [
        Row(line, *(cells[name] for name in _NEEDED), *(cells.get(name, "") for name in _OPTIONAL))
        for line, cells in lines
    ]
    return [row if row.split else replace(row, split=SPLITS[0]) for row in rows]
