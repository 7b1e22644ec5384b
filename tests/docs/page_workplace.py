"""Writes the files that the commands of README and docs take as given, into the current folder."""

import csv
from pathlib import Path

import nibabel
import numpy as np

from tests.docs.page_commands import code_blocks

PATIENTS = 16
"""Patients of a hospital: no batch may have fewer than 8."""


def write_images() -> None:
    """Files of brains with masks, and of hearts, in folders of three hospitals and of unseen patients; labels."""
    random = np.random.default_rng(0)
    for place in ("north", "south", "east", "unseen", "new", "all-files"):
        Path(place).mkdir()
    for place in ("north", "south", "east", "unseen"):
        for number in range(PATIENTS):
            patient = f"{place}{number:02}"
            write_scan(random, f"{place}/{patient}_brain_T1.nii.gz", with_mask=True, is_bright=number % 2 == 1)
            write_scan(random, f"{place}/{patient}_heart_CT.nii.gz", offset=-200)
            if place in ("north", "south"):
                Path(f"all-files/{patient}_brain_T1.nii.gz").symlink_to(
                    Path(f"{place}/{patient}_brain_T1.nii.gz").resolve()
                )
    for name in ("a", "b"):
        write_scan(random, f"new/{name}.nii.gz")
    for place in ("north", "south", "east"):
        write_labels(f"sites/{place}", [place])
    write_labels("holdout", ["unseen"])
    write_labels("pooled", ["north", "south"])


def write_scan(
    random: np.random.Generator, path: str, *, offset: int = 100, with_mask: bool = False, is_bright: bool = False
) -> None:
    """Write a volume of noise in which a cube is bright or dark, and the mask of the cube beside it if asked for."""
    voxels, mask = random.normal(offset, 60, (8, 8, 8)), np.zeros((8, 8, 8), np.uint8)
    mask[2:5, 2:5, 2:5] = 1
    voxels[mask > 0] += 200 if is_bright else -60
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), affine), path)
    if with_mask:
        nibabel.save(nibabel.Nifti1Image(mask, affine), path.replace(".nii.gz", "_mask.nii.gz"))


def write_labels(folder: str, places: list[str]) -> None:
    """Write the label table of the patients of some places: a diagnosis, a size and a scanner."""
    Path(folder).mkdir(parents=True)
    rows = [("subject", "circulatory", "large", "scanner")]
    for place in places:
        rows += [
            (f"{place}{number:02}", ("no", "yes")[number % 2], ("no", "yes")[number // 2 % 2], "AB"[number % 2])
            for number in range(PATIENTS)
        ]
    with Path(folder, "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_converted_images(page: Path) -> None:
    """Write `images.csv` as a page shows it, and the images that it names."""
    [table] = [block.code for block in code_blocks(page.read_text()) if block.language == "csv"]
    Path("images.csv").write_text(table + "\n")
    random = np.random.default_rng(1)
    for row in csv.DictReader(table.splitlines()):
        Path(row["path"]).parent.mkdir(parents=True, exist_ok=True)
        write_scan(random, row["path"])
