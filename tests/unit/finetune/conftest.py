"""Tiny sites with labels and masks, and the run folder of an untrained model."""

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tomli_w

from panfm.finetune.finetune_settings import FinetuneSettings
from tests.conftest import NO_FLOORS
from tests.unit.export.conftest import write_run

__all__ = ["write_run"]
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


@pytest.fixture
def labelled_site(tmp_path) -> Callable[..., Path]:
    """Writes a site of bright and dark cubes in noise: labels `bright` (yes or no), `size` (a number) and `grade`
    (classes), masks of the cubes (0 and 7), every third patient with a picture of the eye; two visits of the first."""

    def write(name: str = "clinic", patients: int = 12, *, splits: bool = True) -> Path:
        folder, random = tmp_path / name, np.random.default_rng(list(name.encode()))
        folder.mkdir()
        table = {"name": name, "labels": "labels.csv", "limits": NO_FLOORS}
        (folder / "site.toml").write_text(tomli_w.dumps(table))
        rows, labels = ["subject,stream,path,split,mask,session"], ["subject,bright,size,grade"]
        for number in range(patients):
            split = ("test" if number % 4 == 3 else "val" if number % 4 == 2 else "train") if splits else "train"
            bright, size = number % 2 if number < 4 else int(random.integers(2)), int(random.integers(2, 5))
            for visit in ("1", "2") if number == 0 else ("",):
                stem = f"{name}-{number}-{visit or 'only'}"
                voxels, mask = random.normal(100, 10, (9, 8, 6)), np.zeros((9, 8, 6), np.uint8)
                mask[2 : 2 + size, 2:5, 1:4] = 7
                voxels[mask > 0] += 300 if bright else -60
                nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), AFFINE), folder / f"{stem}.nii.gz")
                nibabel.save(nibabel.Nifti1Image(mask, AFFINE), folder / f"{stem}-seg.nii.gz")
                rows.append(f"{name}-{number},brain-mr,{stem}.nii.gz,{split},{stem}-seg.nii.gz,{visit}")
            labels.append(f"{name}-{number},{('no', 'yes')[bright]},{size}.5,{('low', 'mid', 'high')[number % 3]}")
        (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
        (folder / "labels.csv").write_text("\n".join(labels) + "\n")
        return folder

    return write


@pytest.fixture
def settings_of() -> Callable[..., FinetuneSettings]:
    """Short settings for a model and a site."""

    def make(model: Path, site: Path, task: str = "labels.csv:bright", **changes: object) -> FinetuneSettings:
        short = {"steps": 6, "batch_size": 4, "validate_every": 2}
        given = {"model": str(model), "data": (str(site),), "task": task}
        return FinetuneSettings.of_options(given | short | changes)

    return make
