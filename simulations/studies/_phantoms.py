"""Phantom draws of a study: rendered once, kept on disk, memory-mapped by every job.

Training subjects come from one place that scans all organs, missing not at random; test subjects are complete.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panfm.config import RunConfig
from panfm.data.store import ImageStore
from simulations.cohorts.in_memory import phantom_store
from simulations.cohorts.phantom_draw import Phantom
from simulations.cohorts.phantom_labels import LABELS

TRAIN_SUBJECTS, TEST_SUBJECTS = 2500, 1000


@dataclass(frozen=True)
class PhantomDraw:
    """One draw of one preset, and where it is kept."""

    preset: str
    draw: int
    run: RunConfig
    folder: Path
    train_subjects: int = TRAIN_SUBJECTS
    test_subjects: int = TEST_SUBJECTS

    def __str__(self) -> str:
        return f"rendering {self.preset} phantom {self.draw}"


@dataclass(frozen=True)
class Cohort:
    """A draw, read back."""

    train: ImageStore
    test: ImageStore
    train_labels: NDArray[np.float64]
    """[N, L] in the order of `LABELS`."""
    test_labels: NDArray[np.float64]


def render_draw(wanted: PhantomDraw) -> Path:
    """Render a draw into its folder; returns the folder."""
    phantom = Phantom(wanted.preset, wanted.draw)
    organs = wanted.run.organs
    places = {
        "train": phantom.draw("train", wanted.train_subjects, organs),
        "test": phantom.draw("test", wanted.test_subjects, organs, complete=True),
    }
    for split, subjects in places.items():
        store = phantom_store(phantom, subjects, wanted.run.streams, split=split)
        folder = wanted.folder / split
        folder.mkdir(parents=True)
        for stream, images in store.images.items():
            np.save(folder / f"{stream}.npy", images)
            np.save(folder / f"{stream}.rows.npy", store.rows[stream])
        np.save(folder / "labels.npy", subjects.labels.astype(np.float64))
        (folder / "subjects.json").write_text(json.dumps(subjects.names), encoding="utf-8")
    return wanted.folder


def open_draw(folder: Path, run: RunConfig) -> Cohort:
    """Read a rendered draw; images stay on disk until they are used."""
    stores = [_open_store(folder / split, split, run) for split in ("train", "test")]
    labels = [np.load(folder / split / "labels.npy") for split in ("train", "test")]
    assert labels[0].shape[1] == len(LABELS)
    return Cohort(stores[0], stores[1], labels[0], labels[1])


def _open_store(folder: Path, split: str, run: RunConfig) -> ImageStore:
    names = json.loads((folder / "subjects.json").read_text(encoding="utf-8"))
    images = {stream: np.load(folder / f"{stream}.npy", mmap_mode="r") for stream in run.streams}
    rows = {stream: np.load(folder / f"{stream}.rows.npy") for stream in run.streams}
    return ImageStore(tuple(names), (split,) * len(names), images, rows)
