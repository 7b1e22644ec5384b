"""A phantom cohort on disk: one folder per hospital, NIfTI files, manifests and labels.

    cohort.toml            what it is: preset, seed, sizes, and what each label stands for
    sites/<site>/          site.toml  manifest.csv  labels.csv  images/<subject>_<stream>.nii.gz
    holdout/               the same for the held-out patients, all of whose organs were scanned

The folder appears whole or not at all, and the same description gives the same bytes.
"""

import gzip
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import tomli_w
from numpy.typing import NDArray

from panfm.config import StreamConfig
from panfm.config.cohort import PhantomCohortConfig
from panfm.data.folder import write_site_folder
from panfm.data.phantom.body import ORGANS
from panfm.data.phantom.draw import Phantom, Subjects
from panfm.data.phantom.labels import LABELS
from panfm.data.phantom.memory import organs_of
from panfm.files import new_folder

VALIDATION_EVERY = 10
"""Every tenth patient of a site is its validation split."""


def write_cohort(
    folder: Path,
    config: PhantomCohortConfig,
    streams: Mapping[str, StreamConfig],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Write a cohort.

    Args:
        folder: must not exist.
        config: preset, seed, sites and their patients.
        streams: what to write of each patient, where the site scans the organ.
        progress: told how many images are written, of how many.

    Raises:
        DataError: the folder exists or cannot be written, or a stream is not an MR volume of an organ that the phantom
            has.
    """
    phantom = Phantom(config.preset, config.seed)
    organs = organs_of(streams)
    places = _draw_places(phantom, config, organs.values())
    total = sum(_num_images(subjects, organs) for subjects in places.values())
    done = 0
    with new_folder(folder) as partial:
        for place, subjects in places.items():
            for written in _write_place(partial / place, phantom, subjects, organs):
                done += written
                progress(done, total)
        (partial / "cohort.toml").write_text(_describe(config, places), encoding="utf-8")


def _draw_places(phantom: Phantom, config: PhantomCohortConfig, organs: Iterable[str]) -> dict[str, Subjects]:
    places = {
        f"sites/{name}": phantom.draw(name, site.subjects, site.organs, age_shift=site.age_shift)
        for name, site in config.sites.items()
    }
    known = tuple(organ for organ in dict.fromkeys(organs) if organ in ORGANS)
    return places | {"holdout": phantom.draw("holdout", config.holdout_subjects, known, complete=True)}


def _num_images(subjects: Subjects, organs: Mapping[str, str]) -> int:
    held = [subjects.organs.index(organ) for organ in organs.values() if organ in subjects.organs]
    return int(subjects.scanned[:, held].sum())


def _write_place(folder: Path, phantom: Phantom, subjects: Subjects, organs: Mapping[str, str]) -> Iterable[int]:
    """Write one site folder; yields 1 per image."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for index, subject in enumerate(subjects.names):
        for stream, organ in organs.items():
            if organ not in subjects.organs or not subjects.scanned[index, subjects.organs.index(organ)]:
                continue
            path = f"images/{subject}_{stream}.nii.gz"
            (folder / path).write_bytes(_nifti(*phantom.render(subjects, index, organ)))
            rows.append((subject, stream, path, _split(folder.name, index)))
            yield 1
    labels = [(subject, *values) for subject, values in zip(subjects.names, subjects.labels.astype(int), strict=True)]
    write_site_folder(folder, rows, tuple(LABELS), labels)


def _split(place: str, index: int) -> str:
    if place == "holdout":
        return "test"
    return "val" if index % VALIDATION_EVERY == VALIDATION_EVERY - 1 else "train"


def _nifti(voxels: NDArray[np.int16], affine: NDArray[np.float64]) -> bytes:
    image = nib.Nifti1Image(voxels, affine)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm")  # type: ignore[no-untyped-call]
    image.set_qform(affine, code=1)  # type: ignore[no-untyped-call]
    image.set_sform(affine, code=1)  # type: ignore[no-untyped-call]
    content = bytearray(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
    content[9] = 255  # "unknown" system: what gzip.compress puts there depends on the version of Python
    return bytes(content)


def _describe(config: PhantomCohortConfig, places: Mapping[str, Subjects]) -> str:
    labels = {
        name: {"kind": label.kind, "weak": label.weak, "organs": list(label.organs)} for name, label in LABELS.items()
    }
    subjects = {place: len(drawn.names) for place, drawn in places.items()}
    return tomli_w.dumps({**config.model_dump(mode="json", by_alias=True), "subjects": subjects, "labels": labels})
