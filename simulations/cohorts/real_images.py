"""Three sites made from real scans, read in place from the folder that $PANFM_REAL_DATA names.

    memory-clinic-north, memory-clinic-south   share out the hippocampus MR volumes (Medical Segmentation Decathlon)
    body-centre                                CT and MR crops of the seven organs, one or two patients per organ
    holdout                                    hippocampus volumes of people at no site

Left and right hippocampus of one person are separate files, and people must not be torn apart by the split. The file
names say who belongs together: volumes 2k-1 and 2k are one person. Nothing documents this; it was checked on the 194
volumes: in such pairs the median intensity differs by 2 % (by a third or more in pairs 2k, 2k+1) and the anterior and
posterior volumes correlate at .83 and .79 (-.04 and -.01). Each volume is one subject of the manifest, though, since
a subject has one image per stream.

Labels are the volumes in mm3 of the anterior (1) and posterior (2) hippocampus in the masks.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import nibabel as nib
import numpy as np
from pydantic import Field

from panfm.config.base import Positive, Seed
from panfm.errors import ConfigError, DataError
from panfm.outputs import new_folder
from panfm.seeds import numpy_generator
from simulations.cohorts.cohort_source import CohortSource, Progress, Streams, listing_of, texts_of, ticker
from simulations.cohorts.site_folder import write_site_folder

ENVIRONMENT = "PANFM_REAL_DATA"
HIPPOCAMPUS = "hippocampus-mr"
CLINICS = ("memory-clinic-north", "memory-clinic-south")
BODY = "body-centre"
LABELS = {"anterior-volume": 1, "posterior-volume": 2}
"""Label -> value of its voxels in the mask."""
_ORGANS = ("brain", "heart", "adipose", "liver", "kidney", "spleen", "pancreas")

Row = tuple[str, str, str, str, str]
"""subject, stream, path, split, mask"""


class RealImagesCohort(CohortSource):
    """Three sites made from the real scans under $PANFM_REAL_DATA."""

    kind: Literal["real-images"]
    seed: Seed = 0
    """The split of the hippocampus volumes over sites and held-out subjects."""
    holdout_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.25
    """Share of hippocampus subjects held out for the probe."""
    limit: Positive | None = None
    """At most this many hippocampus volumes; all when left out."""

    def write(self, folder: Path, streams: Streams, progress: Progress = lambda *_: None) -> None:
        """Write site folders that point to the real scans; no image is copied. Raises as every cohort.

        Scans of streams that the run has not are left out. `progress` is told how many masks are measured.
        """
        source = real_data()
        places = share_out(sorted((source / "hippocampus" / "images").glob("hippocampus_*.nii.gz")), self)
        tick = ticker(progress, sum(map(len, places.values())))
        with new_folder(folder) as partial:
            for place, volumes in places.items():
                labels = []
                for volume in volumes:
                    labels.append((volume.name.removesuffix(".nii.gz"), *measure_mask(_mask_of(volume))))
                    tick()
                rows = [_hippocampus_row(volume, "test" if place == "holdout" else "train") for volume in volumes]
                write_site_folder(partial / place, rows, tuple(LABELS), labels)
            if body := list(_body_rows(source / "organs3d", streams)):
                write_site_folder(partial / "sites" / BODY, body)
            images = {place: len(volumes) for place, volumes in places.items()} | {f"sites/{BODY}": len(body)}
            described = {name: {"kind": "volume", "weak": False, "organs": ["hippocampus"]} for name in LABELS}
            self.write_description(partial, images=images, labels=described)

    def fingerprint(self) -> list[object]:
        """The code that shares the scans out, and the list of the scans."""
        return texts_of([Path(__file__)]) + listing_of(real_data(), "*.nii.gz")


def real_data(part: str = "hippocampus/images") -> Path:
    """The folder of real images. Raises ConfigError when $PANFM_REAL_DATA does not name one that holds `part`."""
    named = os.environ.get(ENVIRONMENT)
    if not named:
        raise ConfigError(f"${ENVIRONMENT} is not set, expected the folder of real images, {part} among them")
    if not (Path(named) / part).is_dir():
        raise ConfigError(f"${ENVIRONMENT}: {named} holds no {part}, expected the folder of real images")
    return Path(named).resolve()


def share_out(volumes: Sequence[Path], cohort: RealImagesCohort) -> dict[str, list[Path]]:
    """Volumes of the holdout and of the two clinics, in the order of their names.

    Guarantees:
        by person: both sides of a person go to one place.
        seeded: by `cohort.seed` alone.
    """
    people: dict[int, list[Path]] = {}
    for volume in volumes:
        people.setdefault(person_of(volume.name), []).append(volume)
    shuffled = [people[person] for person in numpy_generator(cohort.seed, "real-images").permutation(sorted(people))]
    if cohort.limit:
        sizes = np.cumsum([len(person) for person in shuffled])
        shuffled = [person for person, size in zip(shuffled, sizes, strict=True) if size <= cohort.limit]
    num_held_out = round(cohort.holdout_fraction * len(shuffled))
    held_out, trained = shuffled[:num_held_out], shuffled[num_held_out:]
    places = {"holdout": held_out} | {f"sites/{clinic}": trained[at::2] for at, clinic in enumerate(CLINICS)}
    if not all(places.values()):
        raise DataError(f"hippocampus: {len(shuffled)} people cannot be shared out over {len(places)} places")
    return {place: sorted(volume for person in group for volume in person) for place, group in places.items()}


def person_of(name: str) -> int:
    """Number of the person a volume belongs to: `hippocampus_097` and `hippocampus_098` are person 49."""
    number = re.search(r"_(\d+)", name)
    if not number:
        raise DataError(f"{name}: expected a name like hippocampus_097.nii.gz")
    return (int(number[1]) + 1) // 2


def measure_mask(path: Path) -> tuple[float, ...]:
    """Volume in mm3 of each of LABELS in a mask."""
    mask = nib.Nifti1Image.from_filename(path)
    voxel_mm3 = abs(np.linalg.det(mask.affine[:3, :3]))
    voxels = np.asarray(mask.dataobj)
    return tuple(float((voxels == value).sum() * voxel_mm3) for value in LABELS.values())


def _mask_of(volume: Path) -> Path:
    return volume.parents[1] / "labels" / volume.name


def _hippocampus_row(volume: Path, split: str) -> Row:
    return volume.name.removesuffix(".nii.gz"), HIPPOCAMPUS, str(volume), split, str(_mask_of(volume))


def _body_rows(folder: Path, streams: Streams) -> Iterable[Row]:
    """One row per scan of the run's streams; of two scans of one subject and stream the first by name."""
    taken = set()
    for organ in _ORGANS:
        for image in sorted((folder / organ).glob("*_*.nii.gz")):
            subject, _, modality = image.name.removesuffix(".nii.gz").rpartition("_")
            stream = f"{organ}-{modality.lower()}"
            if modality != "mask" and stream in streams and (subject, stream) not in taken:
                taken.add((subject, stream))
                mask = image.with_name(image.name.replace(".nii.gz", "_mask.nii.gz"))
                yield subject, stream, str(image), "train", str(mask) if mask.exists() else ""
