"""The coordinator's table of expected sites, and how many subjects they have.

    site,subjects,brain-mr,heart-mr
    alpha,120,120,80
    beta,60,60,

Columns of streams may be left out; where they are there, an empty cell says that the site does not hold the stream. The
table stays in the run folder and is never sent to a site. A site that is not in it, or says it has more than a tenth
over what is expected (and two, for small ones), takes no part.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from panfm.anatomy import parse_stream
from panfm.data.tables import Line, read_table
from panfm.errors import DataError, ProtocolError, reason
from panfm.sharing.messages import Handshake
from panfm.texts import PLAIN_NAME

FILE = "expected-sites.csv"
"""In a run folder."""
_SITE, _SUBJECTS = "site", "subjects"
_SHARE_OVER, _OVER = 0.1, 2


@dataclass(frozen=True)
class ExpectedSite:
    """One line of the table: a site and its subjects."""

    subjects: int
    streams: Mapping[str, int]
    """Stream it is expected to hold -> subjects."""


@dataclass(frozen=True)
class ExpectedSites:
    """The table: name of a site -> its line."""

    sites: Mapping[str, ExpectedSite]
    streams: tuple[str, ...] = ()
    """Streams that have a column."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a table. Raises DataError: the file, the line, and what is expected."""
        try:
            return cls._parsed(*read_table(path, [_SITE, _SUBJECTS]))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({reason(error)}), expected a table of sites") from error

    @classmethod
    def _parsed(cls, columns: Sequence[str], lines: Sequence[Line]) -> Self:
        streams = tuple(name for name in columns if name not in (_SITE, _SUBJECTS))
        for name in streams:
            _check_stream(name)
        sites: dict[str, ExpectedSite] = {}
        for number, cells in lines:
            site = cells[_SITE]
            if not PLAIN_NAME.fullmatch(site):
                raise DataError(
                    f"line {number}: site {site!r:.40}, expected lower-case letters, digits, dot, dash, underscore"
                )
            if site in sites:
                raise DataError(f"line {number}: site {site!r}, expected a name that stands once")
            subjects = _count(cells[_SUBJECTS], number, _SUBJECTS)
            counts = {name: _count(cells[name], number, name) for name in streams if cells[name]}
            for name, count in counts.items():
                if count > subjects:
                    raise DataError(f"line {number}: {name} is {count}, expected at most the {subjects} subjects")
            sites[site] = ExpectedSite(subjects, counts)
        if not sites:
            raise DataError("no sites, expected a line for each")
        return cls(sites, streams)

    @classmethod
    def of_run(cls, run_dir: Path) -> Self:
        """Make the table of what the sites of a run stated. Raises DataError if its sites.json is damaged."""
        path = run_dir / "sites.json"
        try:
            stated = json.loads(path.read_text(encoding="utf-8"))["sites"]
            sites = {
                site: ExpectedSite(int(one[_SUBJECTS]), dict(one["streams"])) for site, one in sorted(stated.items())
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: does not tell the subjects of each site ({reason(error)})") from error
        return cls(sites, tuple(dict.fromkeys(stream for one in sites.values() for stream in one.streams)))

    def to_csv(self) -> str:
        """Write the table as CSV text."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([_SITE, _SUBJECTS, *self.streams])
        for site, one in self.sites.items():
            writer.writerow([site, one.subjects, *(one.streams.get(stream, "") for stream in self.streams)])
        return text.getvalue()

    def check(self, handshake: Handshake) -> None:
        """Raise ProtocolError for a site that is not expected, or has more subjects than expected."""
        self._check(handshake.site, ExpectedSite(handshake.subjects, handshake.streams))

    def faults(self, actual: "ExpectedSites") -> list[str]:
        """One line for each site of another table that `check` would refuse."""
        faults = []
        for site, one in actual.sites.items():
            try:
                self._check(site, one)
            except ProtocolError as error:
                faults.append(f"site {site}: {error}")
        return faults

    def _check(self, site: str, actual: ExpectedSite) -> None:
        if (expected := self.sites.get(site)) is None:
            raise ProtocolError("is not in the coordinator's table of expected sites")
        _check_count("subjects", actual.subjects, expected.subjects)
        for stream in (stream for stream in self.streams if stream in actual.streams):
            if stream not in expected.streams:
                raise ProtocolError(f"holds {stream}, not expected of it (table of expected sites)")
            _check_count(f"subjects with {stream}", actual.streams[stream], expected.streams[stream])


def _check_count(name: str, count: int, expected: int) -> None:
    most = expected + max(_OVER, int(_SHARE_OVER * expected))
    if count > most:
        raise ProtocolError(f"{count} {name}, expected about {expected}, at most {most} (table of expected sites)")


def _check_stream(name: str) -> None:
    try:
        parse_stream(name)
    except ValueError as error:
        raise DataError(f"line 1: column {error}") from error


def _count(cell: str, line: int, name: str) -> int:
    if not cell.isascii() or not cell.isdigit() or len(cell) > 9 or int(cell) < 1:
        raise DataError(f"line {line}: {name} is {cell!r:.40}, expected a whole number from 1")
    return int(cell)
