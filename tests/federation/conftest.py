"""Three small hospitals on disk, and a run over them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from panfm.config import RunConfig, load_run
from server.run_folder import RunFolder
from simulations.engines import Job
from simulations.engines.local import run as run_local

HOLDINGS = {"alpha": ("brain", "heart"), "beta": ("heart",), "gamma": ("brain", "liver")}

RUN = """
name = "small"
seed = 3

[streams]
brain-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }
heart-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }
liver-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }

[train]
rounds = 3
local-steps = 2
batch-size = 3
"""


class Federation:
    """Starts runs over the small hospitals."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sites = folder / "sites"

    def describe(self, *overrides: str) -> RunConfig:
        path = self.folder / "small.toml"
        path.write_text(RUN)
        return load_run(path, overrides)

    def job(self, name: str, *overrides: str) -> Job:
        """A run folder that holds nothing but its run.toml."""
        run_dir = self.folder / name
        RunFolder.create(run_dir, self.describe(*overrides))
        return Job(self.sites, run_dir)

    def run(self, name: str, *overrides: str) -> Path:
        """Run to the end in this process; returns the run folder."""
        job = self.job(name, *overrides)
        run_local(job)
        return job.run_dir


@pytest.fixture
def federation(tmp_path: Path, write_site: Callable[..., Path]) -> Federation:
    for name, organs in HOLDINGS.items():
        write_site(tmp_path / "sites" / name, name, organs)
    return Federation(tmp_path)
