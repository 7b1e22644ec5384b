"""Cohorts of whole-body phantoms: correlated patients, seven organs as a scanner gives them, labels, and missing scans.

They stand in for a cohort that is not public. Images are NIfTI files, `images/<subject>_<stream>.nii.gz`; all organs of
the held-out patients were scanned.
"""

import gzip
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from panfm.config.base import Config, Name, Positive, Seed
from panfm.outputs import new_folder
from simulations.cohorts.cohort_source import (
    CohortSource,
    Progress,
    Streams,
    refuse_holdout,
    site_split,
    texts_of,
    ticker,
)
from simulations.cohorts.phantom_body import ORGANS
from simulations.cohorts.phantom_draw import Phantom, Subjects, organs_of
from simulations.cohorts.phantom_labels import LABELS
from simulations.cohorts.site_folder import write_site_folder


class PhantomSiteConfig(Config):
    """One phantom hospital."""

    organs: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """Organs it scans."""
    subjects: Positive
    """Patients it has."""
    age_shift: Annotated[float, Field(ge=-10.0, le=10.0)] = 0.0
    """Its patients' mean age against the cohort's, in standard deviations."""


class PhantomCohort(CohortSource):
    """A cohort of whole-body phantoms."""

    kind: Literal["phantom"]
    preset: Literal["transient", "lasting", "shortcut", "textured"] = "transient"
    """`transient`: training outgrows the dominance of heart and adipose; `lasting`: it does not; `shortcut`: neither
    does scaling of the inputs take it away; `textured`: factors show in the direction of a texture, which plain
    statistics cannot read."""
    seed: Seed = 0
    """The draw of the cohort, apart from the run's seed."""
    holdout_subjects: Positive = 300
    """Patients with all organs, at no site: the probe's test set."""
    sites: Annotated[dict[Name, PhantomSiteConfig], Field(min_length=1)]
    """Name of a site -> its patients and streams."""

    @model_validator(mode="after")
    def _no_site_has_the_held_out_patients(self) -> Self:
        refuse_holdout(self.sites)
        return self

    def write(self, folder: Path, streams: Streams, progress: Progress = lambda *_: None) -> None:
        """Write NIfTI files. Raises DataError as every cohort, or a stream is no MR volume of a phantom's organ."""
        phantom, organs = Phantom(self.preset, self.seed), organs_of(streams)
        places = _draw_places(phantom, self, organs.values())
        tick = ticker(progress, sum(_num_images(subjects, organs) for subjects in places.values()))
        with new_folder(folder) as partial:
            for place, subjects in places.items():
                _write_place(partial / place, phantom, subjects, organs, tick)
            labels = {
                name: {"kind": label.kind, "weak": label.weak, "organs": list(label.organs)}
                for name, label in LABELS.items()
            }
            numbers = {place: len(subjects.names) for place, subjects in places.items()}
            self.write_description(partial, subjects=numbers, labels=labels)

    def fingerprint(self) -> list[object]:
        """Source of the code that draws the phantoms."""
        return texts_of(Path(__file__).parent.glob("phantom*.py"))


def _draw_places(phantom: Phantom, cohort: PhantomCohort, organs: Iterable[str]) -> dict[str, Subjects]:
    places = {
        f"sites/{name}": phantom.draw(name, site.subjects, site.organs, age_shift=site.age_shift)
        for name, site in cohort.sites.items()
    }
    known = tuple(organ for organ in dict.fromkeys(organs) if organ in ORGANS)
    return places | {"holdout": phantom.draw("holdout", cohort.holdout_subjects, known, complete=True)}


def _num_images(subjects: Subjects, organs: Mapping[str, str]) -> int:
    columns = [subjects.organs.index(organ) for organ in organs.values() if organ in subjects.organs]
    return int(subjects.scanned[:, columns].sum())


def _write_place(
    folder: Path, phantom: Phantom, subjects: Subjects, organs: Mapping[str, str], tick: Callable[[], None]
) -> None:
    (folder / "images").mkdir(parents=True)
    rows = []
    for index, subject in enumerate(subjects.names):
        for stream, organ in organs.items():
            if organ not in subjects.organs or not subjects.scanned[index, subjects.organs.index(organ)]:
                continue
            path = f"images/{subject}_{stream}.nii.gz"
            (folder / path).write_bytes(_nifti(*phantom.render(subjects, index, organ)))
            rows.append((subject, stream, path, "test" if folder.name == "holdout" else site_split(index)))
            tick()
    labels = [(subject, *values) for subject, values in zip(subjects.names, subjects.labels.astype(int), strict=True)]
    write_site_folder(folder, rows, tuple(LABELS), labels)


def _nifti(voxels: NDArray[np.int16], affine: NDArray[np.float64]) -> bytes:
    import nibabel as nib

    image = nib.Nifti1Image(voxels, affine)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm")  # type: ignore[no-untyped-call]
    image.set_qform(affine, code=1)  # type: ignore[no-untyped-call]
    image.set_sform(affine, code=1)  # type: ignore[no-untyped-call]
    content = bytearray(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
    content[9] = 255  # "unknown" system: what gzip.compress puts there depends on the version of Python
    return bytes(content)
