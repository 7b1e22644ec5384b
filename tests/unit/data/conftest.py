"""Small real site folders, written as a hospital would."""

from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from panfm.cli import main
from panfm.config import StreamConfig
from panfm.data.manifest import QUARANTINE

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
        image.header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))
        nib.save(image, self.folder / name)

    def check(self, *options):
        """`panfm site check` on it: what it printed and how it ended."""
        result = CliRunner().invoke(main, ["site", "check", str(self.folder), *options])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert "Traceback" not in result.output
        return result

    def faults(self, *options) -> list[str]:
        return [line for line in self.check(*options).output.splitlines() if ": found " in line]

    def assert_one_fault(self, text, *options) -> str:
        """The check fails for one reason, which says `text`; returns the line."""
        assert self.check(*options).exit_code == 1
        (line,) = self.faults(*options)
        assert text in line
        assert ", expected " in line
        return line

    def assert_quarantine_leaves_one_row(self):
        result = self.check("--quarantine")
        assert result.exit_code == 0
        assert "1 row left out, 1 stay" in result.output
        assert len((self.folder / QUARANTINE).read_text().splitlines()) == 2
        assert len(self.faults()) == 1  # the check itself goes on seeing the fault


@pytest.fixture
def site(tmp_path):
    return SiteFolder(tmp_path / "clinic")


@pytest.fixture
def streams():
    return {"brain-mr": STREAM, "heart-mr": STREAM}
