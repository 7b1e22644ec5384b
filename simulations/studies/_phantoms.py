"""Phantom draws of a study: rendered once, kept on disk, memory-mapped by every job.

Training subjects come from one place that scans all organs, missing not at random; test subjects are complete.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panfm.config import StreamConfig
from panfm.data.read import prepare_volume
from panfm.data.store import ImageStore
from simulations.cohorts.phantom_draw import Phantom, Subjects, organs_of
from simulations.cohorts.phantom_labels import LABELS


@dataclass(frozen=True)
class Cohort:
    """A draw, read back."""

    train: ImageStore
    test: ImageStore
    train_labels: NDArray[np.float64]
    """[N, L] in the order of `LABELS`."""
    test_labels: NDArray[np.float64]


def render_draw(
    folder: Path,
    phantom: Phantom,
    streams: Mapping[str, StreamConfig],
    organs: Sequence[str],
    *,
    train_subjects: int = 2500,
    test_subjects: int = 1000,
) -> Path:
    """Render training and test subjects, scanned at some of the organs, into a new folder; returns the folder."""
    subjects = {
        "train": phantom.draw("train", train_subjects, organs),
        "test": phantom.draw("test", test_subjects, organs, complete=True),
    }
    for split, drawn in subjects.items():
        store = phantom_store(phantom, drawn, streams, split=split)
        (folder / split).mkdir(parents=True)
        for stream, images in store.images.items():
            np.save(folder / split / f"{stream}.npy", images)
            np.save(folder / split / f"{stream}.rows.npy", store.rows[stream])
        np.save(folder / split / "labels.npy", drawn.labels.astype(np.float64))
        (folder / split / "subjects.json").write_text(json.dumps(drawn.names), encoding="utf-8")
    return folder


def phantom_store(
    phantom: Phantom, subjects: Subjects, streams: Mapping[str, StreamConfig], *, split: str = "train"
) -> ImageStore:
    """Render the subjects' images at the model's resolution, in memory.

    Guarantees:
        like files: equals, bit for bit, the store opened from the files that `PhantomCohort` writes of these subjects.
    Raises:
        DataError: a stream is not an MR volume of an organ that the phantom has.
    """
    images, rows = {}, {}
    for stream, organ in organs_of(streams).items():
        if organ in subjects.organs:
            rows[stream] = np.flatnonzero(subjects.scanned[:, subjects.organs.index(organ)])
            images[stream] = np.empty((len(rows[stream]), 1, *streams[stream].shape), dtype=np.float32)
            for row, index in enumerate(rows[stream].tolist()):
                volume = phantom.render(subjects, index, organ)
                images[stream][row] = prepare_volume(*volume, stream, streams[stream])
    return ImageStore(subjects.names, (split,) * len(subjects.names), images, rows)


def open_draw(folder: Path, streams: Collection[str]) -> Cohort:
    """Read a rendered draw; images stay on disk until they are used."""
    stores = [_open_store(folder / split, split, streams) for split in ("train", "test")]
    labels = [np.load(folder / split / "labels.npy") for split in ("train", "test")]
    assert labels[0].shape[1] == len(LABELS)
    return Cohort(stores[0], stores[1], labels[0], labels[1])


def _open_store(folder: Path, split: str, streams: Collection[str]) -> ImageStore:
    names = json.loads((folder / "subjects.json").read_text(encoding="utf-8"))
    images = {stream: np.load(folder / f"{stream}.npy", mmap_mode="r") for stream in streams}
    rows = {stream: np.load(folder / f"{stream}.rows.npy") for stream in streams}
    return ImageStore(tuple(names), (split,) * len(names), images, rows)
