"""Small real site folders, written as a hospital would."""

from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from panfm.config import StreamConfig

STREAM = StreamConfig(shape=(8, 8, 8), patch=(4, 4, 4), spacing_mm=(2.0, 2.0, 2.0))


def volume(seed=0, shape=(9, 8, 7)):
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(np.int16)


@dataclass
class SiteFolder:
    """A site folder under construction; every `add` writes an image and a manifest row."""

    folder: Path
    header: str = "subject,stream,path,split,mask"
    lines: list[str] = field(default_factory=list)

    def write(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "site.toml").write_text('name = "clinic"\nlabels = "labels.csv"\n')
        (self.folder / "manifest.csv").write_text("\n".join([self.header, *self.lines]) + "\n")
        return self.folder

    def row(self, subject, stream="brain-mr", path=None, split="", mask=""):
        self.lines.append(",".join([subject, stream, path or f"{subject}_{stream}.nii.gz", split, mask]))
        self.write()

    def add(self, subject, stream="brain-mr", voxels=None, split="", mask=""):
        self.nifti(f"{subject}_{stream}.nii.gz", volume(len(self.lines)) if voxels is None else voxels)
        self.row(subject, stream, split=split, mask=mask)

    def nifti(self, name, voxels, affine=None):
        self.folder.mkdir(parents=True, exist_ok=True)
        affine = np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine
        image = nib.Nifti1Image(voxels, None)
        image.header.set_sform(affine, code=1)
        nib.save(image, self.folder / name)


@pytest.fixture
def site(tmp_path):
    return SiteFolder(tmp_path / "clinic")


@pytest.fixture
def streams():
    return {"brain-mr": STREAM, "heart-mr": STREAM}
