"""Real images with labels or masks for the study `downstream`, as folders of two sites and of held-out people.

    hippocampus   MR volumes with masks of the anterior and the posterior hippocampus; both sides of a person together
    slices        the middle sagittal slice of each of these volumes, and its mask, as pictures of 60 x 60 mm
    busi          breast ultrasound pictures: benign, malignant or normal

The seed says who is held out: a quarter of the people, of `busi` a quarter of each class.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from panfm.seeds import numpy_generator
from simulations.cohorts.real_images import CLINICS, HIPPOCAMPUS, RealImagesCohort, real_data, share_out
from simulations.cohorts.real_modalities import FOLDER, read_pictures
from simulations.cohorts.site_folder import write_site_folder

ULTRASOUND, FINDING = "breast-ultrasound", "finding"
_SITES, _HOLDOUT = tuple(f"sites/{clinic}" for clinic in CLINICS), "holdout"
_HELD_OUT = 0.25
_SIDE = 60
"""Pixels along the edges of a slice, of 1 mm each. No scan is longer."""


def site_folders(folder: Path) -> list[Path]:
    """Folders of the sites and of the held-out people."""
    return [folder / place for place in (*_SITES, _HOLDOUT)]


def write_hippocampus(folder: Path, seed: int) -> None:
    """Write folders that point to the volumes and their masks."""
    for place, volumes in _people(seed).items():
        rows = [(_name(volume), HIPPOCAMPUS, volume, _split(place), _mask_of(volume)) for volume in volumes]
        write_site_folder(folder / place, rows)


def write_slices(folder: Path, seed: int) -> None:
    """Write the slices of the volumes and of their masks, and folders of them."""
    for place, volumes in _people(seed).items():
        (folder / place).mkdir(parents=True)
        rows = []
        for name, volume in ((_name(volume), volume) for volume in volumes):
            image, mask = middle_slice(volume), middle_slice(_mask_of(volume))
            low, high = np.percentile(image, (1, 99))
            grey = np.clip((image - low) / (high - low), 0.0, 1.0) * 255.0
            for file, values in ((f"{name}.png", grey.round()), (f"{name}-mask.png", mask)):
                Image.fromarray(padded(values)).save(folder / place / file)
            rows.append((name, HIPPOCAMPUS, f"{name}.png", _split(place), f"{name}-mask.png"))
        write_site_folder(folder / place, rows)


def write_busi(folder: Path, seed: int) -> None:
    """Write folders that point to the ultrasound pictures, with their classes."""
    source = real_data(FOLDER) / FOLDER
    pictures = [picture for picture in read_pictures(source) if picture["modality"] == "ultrasound"]
    shared = dict[str, list[Mapping[str, str]]]()
    for kind in sorted({picture["class"] for picture in pictures}):
        own = [picture for picture in pictures if picture["class"] == kind]
        order = numpy_generator(seed, "downstream", kind).permutation(len(own))
        held_out, trained = np.split(order, [round(_HELD_OUT * len(own))])
        for place, part in zip((*_SITES, _HOLDOUT), (trained[::2], trained[1::2], held_out), strict=True):
            shared.setdefault(place, []).extend(own[index] for index in part)
    for place, there in shared.items():
        rows = [(Path(one["file"]).stem, ULTRASOUND, source / one["file"], _split(place)) for one in there]
        write_site_folder(folder / place, rows, (FINDING,), [(Path(one["file"]).stem, one["class"]) for one in there])


WRITERS: Mapping[str, Callable[[Path, int], None]] = {
    "hippocampus": write_hippocampus,
    "slices": write_slices,
    "busi": write_busi,
}
"""Task -> writer of its folders, which takes a new folder and a seed."""


def middle_slice(path: Path) -> NDArray[np.float64]:
    """Middle sagittal slice of a volume: anterior to the right, superior on top."""
    volume = nib.as_closest_canonical(nib.Nifti1Image.from_filename(path))  # type: ignore[no-untyped-call]
    voxels = np.asarray(volume.dataobj, dtype=np.float64)
    return voxels[voxels.shape[0] // 2].T[::-1]


def padded(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Pad a slice with zeros to the square of all slices, in whose middle it then lies."""
    margins = [_SIDE - length for length in values.shape]
    return np.pad(values.astype(np.uint8), [(margin // 2, margin - margin // 2) for margin in margins])


def _people(seed: int) -> dict[str, list[Path]]:
    """Volumes of each place."""
    volumes = sorted((real_data() / "hippocampus" / "images").glob("hippocampus_*.nii.gz"))
    return share_out(volumes, RealImagesCohort(kind="real-images", seed=seed, holdout_fraction=_HELD_OUT))


def _name(volume: Path) -> str:
    return volume.name.removesuffix(".nii.gz")


def _mask_of(volume: Path) -> Path:
    return volume.parents[1] / "labels" / volume.name


def _split(place: str) -> str:
    return "test" if place == _HOLDOUT else "train"
