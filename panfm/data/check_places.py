"""The check across places: sites that share images, and held-out subjects who are also at a site.

Two images with the same content are one, whatever they are called; two subjects with one key (`subject_key`) are one
person where a hold-out is compared with a site. Two sites may number their subjects alike: that is only told.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from panfm.config import StreamConfig, load_site, site_path
from panfm.data.check import SiteReport
from panfm.data.joins import Join, by_key, counted, named
from panfm.data.labels import read_cells
from panfm.data.manifest import Fault, Row
from panfm.data.subjects import subject_key
from panfm.errors import DataError, NoSubjectsError

if TYPE_CHECKING:
    from panfm.data.store import ImageStore


@dataclass(frozen=True)
class Place:
    """A site, or the hold-out: who is there, and which images."""

    name: str
    images: Sequence[tuple[Row, bytes]]
    """Row and hash of the content of every image."""
    is_holdout: bool = False

    @classmethod
    def of_report(cls, report: SiteReport, *, is_holdout: bool = False) -> "Place":
        """The sound images of a check."""
        sound = set(report.rows)
        images = [(row, digest) for digest, row in report.contents.items() if row in sound]
        return cls(report.site, images, is_holdout)

    @classmethod
    def of_store(cls, name: str, store: "ImageStore", *, is_holdout: bool = False) -> "Place":
        """The images of an opened folder."""
        images = [
            (Row(0, store.subjects[at], stream, f"{store.subjects[at]} {stream}", store.splits[at]), digest)
            for stream, digests in store.digests.items()
            for at, digest in zip(store.rows[stream], digests, strict=True)
        ]
        return cls(name, images, is_holdout)

    @property
    def subjects(self) -> Mapping[str, str]:
        """Key -> spelling of the subjects."""
        return by_key(row.subject for row, _ in self.images)


def leaks(places: Sequence[Place]) -> dict[str, list[Fault]]:
    """Place -> faults of its rows that are at an earlier place as well; the hold-out comes last."""
    faults: dict[str, list[Fault]] = {place.name: [] for place in places}
    seen: dict[bytes, tuple[str, Row]] = {}
    people: dict[str, str] = {}
    for place in sorted(places, key=lambda place: place.is_holdout):
        for row, digest in place.images:
            other, twin = seen.setdefault(digest, (place.name, row))
            if other != place.name:
                given = f"the same content as {twin.path} at {other}"
                faults[place.name].append(Fault(row.path, given, "an image at one place", row))
            elif place.is_holdout and (other := people.get(subject_key(row.subject), "")):
                given = f"subject {row.subject!r} of the hold-out at {other} as well"
                expected = "held-out subjects who are at no site (another person needs another identifier)"
                faults[place.name].append(Fault(row.path, given, expected, row))
        if not place.is_holdout:
            people |= {key: place.name for key in place.subjects if key not in people}
    return faults


def same_names(places: Iterable[Place]) -> list[str]:
    """One line for each pair of sites with subjects of the same name."""
    sites = [place for place in places if not place.is_holdout]
    pairs = [(one, other) for number, one in enumerate(sites) for other in sites[number + 1 :]]
    both = {
        (one.name, other.name): [one.subjects[key] for key in sorted(one.subjects.keys() & other.subjects.keys())]
        for one, other in pairs
    }
    return [
        f"{one} and {other}: {counted(len(names), 'subject')} of the same name, taken for different people: "
        f"{named(names)}"
        for (one, other), names in both.items()
        if names
    ]


def empty_split(report: SiteReport, split: str, streams: Mapping[str, StreamConfig] | None) -> Fault | None:
    """The fault of a site without training subjects, or of a hold-out without test subjects, of the run's streams."""
    names = list(streams) if streams else sorted({row.stream for row in report.all_rows})
    if not report.all_rows or any(row.split == split and row.stream in names for row in report.all_rows):
        return None
    return Fault(report.site, *NoSubjectsError.words(split, names))


def label_lines(folder: Path, report: SiteReport) -> list[str]:
    """Account of a site's label table: which of its subjects have images, and the reverse.

    Raises:
        DataError: it cannot be read, or has no column of subjects.
    """
    site = load_site(folder)
    if site.labels is None:
        return []
    path = site_path(folder, site.labels)
    subjects = read_cells(path).subjects
    return Join.of((row.subject for row in report.rows), subjects).lines(f"the images of {site.name}", site.labels)


def refuse_leaks(places: Sequence[Place]) -> None:
    """Raise DataError, one line for each image, if a place shares images with another or a hold-out subjects."""
    if lines := [f"{name}: {fault}" for name, faults in leaks(places).items() for fault in faults]:
        raise DataError("\n".join(lines))
