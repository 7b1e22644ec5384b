"""Cohorts of phantom pictures: ten modalities that show the same six shapes, one picture per patient.

They ask whether a model that sees many modalities finds what they have in common: the class of the shape is the same in
all of them, and intensities, textures and noise are not. Pictures are PNG files, `images/<subject>_<stream>.png`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from panfm.anatomy import parse_stream
from panfm.config.base import Name, Positive, Seed
from panfm.errors import DataError
from panfm.outputs import new_folder
from panfm.seeds import numpy_generator
from simulations.cohorts.cohort_source import (
    Progress,
    StreamCohort,
    Streams,
    StreamSiteConfig,
    site_split,
    texts_of,
    ticker,
)
from simulations.cohorts.picture_looks import render
from simulations.cohorts.picture_shapes import SHAPES, draw_mask
from simulations.cohorts.site_folder import write_site_folder

LABELS = tuple(f"shape-{shape}" for shape in SHAPES)


class PictureSiteConfig(StreamSiteConfig):
    """One phantom hospital that has pictures of some modalities."""

    subjects: Positive
    """Patients it has, shared out evenly over its streams: each patient has one image."""


class PictureCohort(StreamCohort):
    """A cohort of phantom pictures of ten modalities."""

    kind: Literal["modalities"]
    seed: Seed = 0
    """The draw of the cohort, apart from the run's seed."""
    holdout_subjects: Positive = 60
    """Patients per stream at no site: the probe's test set. As many again to fit on for a held-out stream."""
    sites: Annotated[dict[Name, PictureSiteConfig], Field(min_length=1)]
    """Name of a site -> its patients and streams."""

    def write(self, folder: Path, streams: Streams, progress: Progress = lambda *_: None) -> None:
        """Write PNG files. Raises DataError as every cohort, or a stream is not one of pictures."""
        check_streams({stream: streams[stream] for stream in self.named_streams})
        places = draw_places(self)
        tick = ticker(progress, sum(map(len, places.values())))
        with new_folder(folder) as partial:
            for place, patients in places.items():
                _write_place(partial / place, patients, tick)
            numbers = {place: len(patients) for place, patients in places.items()}
            self.write_description(partial, subjects=numbers, labels={name: {"kind": "class"} for name in LABELS})

    def fingerprint(self) -> list[object]:
        """Source of the code that draws the pictures."""
        return texts_of(Path(__file__).parent.glob("picture*.py"))


@dataclass(frozen=True)
class Patient:
    """One patient and what its one picture shows.

    Guarantees:
        deterministic: shape and picture depend on (seed, name, stream) alone.
    """

    name: str
    stream: str
    split: str
    seed: int
    """Seed of the cohort."""

    @property
    def shape(self) -> str:
        """Class of the shape."""
        return tuple(SHAPES)[int(self._rng("shape").integers(len(SHAPES)))]

    def picture(self) -> NDArray[np.uint8]:
        """uint8 [SIZE, SIZE], or [SIZE, SIZE, 3] for a modality in colour."""
        rng = self._rng("picture")
        return render(parse_stream(self.stream)[1], draw_mask(self.shape, rng), rng)

    def _rng(self, purpose: str) -> np.random.Generator:
        return numpy_generator(self.seed, "modalities", purpose, self.name, self.stream)


def draw_places(cohort: PictureCohort) -> dict[str, list[Patient]]:
    """Patients of `sites/<name>` and of `holdout`; streams take turns."""
    places = {
        f"sites/{name}": _draw(name, _turns(site.streams, site.subjects), cohort.seed)
        for name, site in cohort.sites.items()
    }
    turns = _turns(cohort.held_out, cohort.holdout_subjects * len(cohort.held_out))
    tested = _turns(cohort.named_streams, cohort.holdout_subjects * len(cohort.named_streams))
    splits = [(stream, "train") for stream, _ in turns] + [(stream, "test") for stream, _ in tested]
    patients = [Patient(f"holdout-{at:05d}", stream, split, cohort.seed) for at, (stream, split) in enumerate(splits)]
    return places | {"holdout": patients}


def patient_labels(patients: Sequence[Patient]) -> NDArray[np.int64]:
    """One column of 0 and 1 per shape, in the order of `LABELS`: [N, 6]."""
    classes = [list(SHAPES).index(patient.shape) for patient in patients]
    return np.eye(len(SHAPES), dtype=np.int64)[classes]


def check_streams(streams: Streams) -> None:
    """Raise DataError for a stream that cannot be drawn."""
    for stream, config in streams.items():
        if config.is_volume:
            raise DataError(f"stream {stream}: the modalities cohort has pictures only, expected a shape of two axes")


def _draw(place: str, turns: Sequence[tuple[str, int]], seed: int) -> list[Patient]:
    return [Patient(f"{place}-{at:05d}", stream, site_split(turn), seed) for at, (stream, turn) in enumerate(turns)]


def _turns(streams: Sequence[str], number: int) -> list[tuple[str, int]]:
    """(stream, how many of it came before), streams in turn."""
    return [(streams[at % len(streams)], at // len(streams)) for at in range(number)]


def _write_place(folder: Path, patients: Sequence[Patient], tick: Callable[[], None]) -> None:
    (folder / "images").mkdir(parents=True)
    rows = []
    for patient in patients:
        path = f"images/{patient.name}_{patient.stream}.png"
        Image.fromarray(patient.picture()).save(folder / path, "PNG")
        rows.append((patient.name, patient.stream, path, patient.split))
        tick()
    labels = [(patient.name, *row) for patient, row in zip(patients, patient_labels(patients), strict=True)]
    write_site_folder(folder, rows, LABELS, labels)
