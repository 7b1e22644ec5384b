"""Patients of a modalities cohort: who has which picture of which shape, and the pictures themselves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from panfm.anatomy import parse_stream
from panfm.config import StreamConfig
from panfm.config.cohort import ModalitiesCohortConfig
from panfm.data.modalities.render import render
from panfm.data.modalities.shapes import SHAPES, draw_mask
from panfm.data.read import prepare_picture
from panfm.data.store import ImageStore
from panfm.errors import DataError
from panfm.seeds import numpy_generator

VALIDATION_EVERY = 10
"""Of each stream, every tenth patient of a site is its validation split."""
LABELS = tuple(f"shape-{shape}" for shape in SHAPES)


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
    """Of the cohort."""

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


def draw_places(config: ModalitiesCohortConfig) -> dict[str, list[Patient]]:
    """Patients of `sites/<name>` and of `holdout`; streams take turns."""
    places = {
        f"sites/{name}": _draw(name, _turns(site.streams, site.subjects), _site_split, config.seed)
        for name, site in config.sites.items()
    }
    turns = _turns(config.held_out, config.holdout_subjects * len(config.held_out))
    tested = _turns(config.named_streams, config.holdout_subjects * len(config.named_streams))
    held = [(stream, "train") for stream, _ in turns] + [(stream, "test") for stream, _ in tested]
    patients = [Patient(f"holdout-{at:05d}", stream, split, config.seed) for at, (stream, split) in enumerate(held)]
    return places | {"holdout": patients}


def patient_labels(patients: Sequence[Patient]) -> NDArray[np.int64]:
    """One column of 0 and 1 per shape, in the order of `LABELS`: [N, 6]."""
    classes = [list(SHAPES).index(patient.shape) for patient in patients]
    return np.eye(len(SHAPES), dtype=np.int64)[classes]


def modality_store(
    patients: Sequence[Patient],
    streams: Mapping[str, StreamConfig],
    *,
    on_image: Callable[[], None] = lambda: None,
) -> ImageStore:
    """The patients' pictures in memory, in the patients' order.

    Guarantees:
        like files: equals, bit for bit, the store opened from the files that `write_modalities` writes of them.
    Raises:
        DataError: a stream is not one of pictures.
    """
    check_streams(streams)
    images, rows = {}, {}
    for stream, config in streams.items():
        held = [at for at, patient in enumerate(patients) if patient.stream == stream]
        if held:
            images[stream] = np.empty((len(held), config.channels, *config.shape), dtype=np.float32)
            rows[stream] = np.array(held, dtype=np.int64)
        for position, at in enumerate(held):
            images[stream][position] = prepare_picture(Image.fromarray(patients[at].picture()), config)
            on_image()
    return ImageStore(tuple(p.name for p in patients), tuple(p.split for p in patients), images, rows)


def check_streams(streams: Mapping[str, StreamConfig]) -> None:
    """Raise DataError for a stream that cannot be drawn."""
    for stream, config in streams.items():
        if config.is_volume:
            raise DataError(f"stream {stream}: the modalities cohort has pictures only, expected a shape of two axes")


def _draw(place: str, turns: Sequence[tuple[str, int]], split: Callable[[int], str], seed: int) -> list[Patient]:
    return [Patient(f"{place}-{at:05d}", stream, split(turn), seed) for at, (stream, turn) in enumerate(turns)]


def _turns(streams: Sequence[str], number: int) -> list[tuple[str, int]]:
    """(stream, how many of it came before), streams in turn."""
    return [(streams[at % len(streams)], at // len(streams)) for at in range(number)]


def _site_split(turn: int) -> str:
    return "val" if turn % VALIDATION_EVERY == VALIDATION_EVERY - 1 else "train"
