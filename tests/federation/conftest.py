"""Three small hospitals on disk, and a run over them."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from panfm.config import RunConfig, load_run
from simulations.engines import Job
from simulations.engines.local import run as run_local

HOLDINGS = {"alpha": ("brain", "heart"), "beta": ("heart",), "gamma": ("brain", "liver")}
SUBJECTS = 6

RUN = """
name = "small"
seed = 3

[streams]
brain-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 4] }
heart-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 4] }
liver-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 4] }

[train]
rounds = 3
local-steps = 2
batch-size = 3
"""


def write_site(folder: Path, name: str, organs: tuple[str, ...], subjects: int = SUBJECTS) -> None:
    """A site folder of noise volumes; the last subject is for validation."""
    folder.mkdir(parents=True)
    (folder / "site.toml").write_text(f'name = "{name}"\n')
    rows = ["subject,stream,path,split"]
    generator = np.random.default_rng([len(name), ord(name[0])])
    for subject in range(subjects):
        split = "val" if subject == subjects - 1 else "train"
        for organ in organs:
            path = f"{name}-{subject}-{organ}.nii.gz"
            volume = generator.uniform(0, 1000, size=(8, 8, 8)).astype(np.int16)
            nibabel.save(nibabel.Nifti1Image(volume, np.diag([8.0, 8.0, 8.0, 1.0])), folder / path)
            rows.append(f"{name}-{subject},{organ}-mr,{path},{split}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    for name, organs in HOLDINGS.items():
        write_site(tmp_path / "sites" / name, name, organs)
    return tmp_path / "sites"


@pytest.fixture
def run_toml(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RUN)
    return path


class Federation:
    """Starts runs over the small hospitals."""

    def __init__(self, folder: Path, sites: Path, run_toml: Path) -> None:
        self.folder = folder
        self.sites = sites
        self.run_toml = run_toml

    def describe(self, *overrides: str) -> RunConfig:
        return load_run(self.run_toml, overrides)

    def job(self, name: str, *overrides: str) -> Job:
        """A run folder that holds nothing but its run.toml."""
        from panfm.config import dump_toml

        run_dir = self.folder / name
        run_dir.mkdir(exist_ok=True)
        (run_dir / "run.toml").write_text(dump_toml(self.describe(*overrides)))
        return Job(self.sites, run_dir)

    def run(self, name: str, *overrides: str) -> Path:
        """Run to the end in this process; returns the run folder."""
        job = self.job(name, *overrides)
        run_local(job)
        return job.run_dir


@pytest.fixture
def federation(tmp_path: Path, sites: Path, run_toml: Path) -> Federation:
    return Federation(tmp_path, sites, run_toml)
