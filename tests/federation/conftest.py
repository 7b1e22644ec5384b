"""Three small hospitals on disk, and a run over them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from panfm.config import RunConfig, load_run
from server.run_folder import RunFolder
from simulations.engines.job import Job
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


SUMMED = [f"streams.{stream}-mr.input-constants=summed" for stream in ("brain", "heart", "liver")]
GATED = 'gate={ measure = "labels" }'
TASKS = 'probe.tasks={ old = ["old"], shape = ["round", "flat"] }'
LIMITS = {
    "may-leave": ["updates", "counts", "loss", "saliency", "label-sums", "input-sums"],
    "smallest-batch": 1,
    "smallest-steps": 1,
}


@pytest.fixture
def labelled(tmp_path: Path, write_site: Callable[..., Path]) -> Federation:
    """The three hospitals with twelve patients each, and a table of labels; gamma knows one of them."""
    for name, organs in HOLDINGS.items():
        folder = write_site(tmp_path / "sites" / name, name, organs, subjects=12)
        label(folder, name, ("old", "round", "flat") if name != "gamma" else ("old",))
    return Federation(tmp_path)


def label(folder: Path, name: str, names: tuple[str, ...]) -> None:
    """Write a table of drawn labels, and let their sums leave."""
    random = np.random.default_rng(len(name))
    rows = [f"subject,{','.join(names)}"]
    for number in range(12):
        old, is_round = random.integers(0, 2, 2).tolist()
        values = {"old": old, "round": is_round, "flat": 1 - is_round}
        rows.append(",".join([f"{name}-{number}", *(str(values[label]) for label in names)]))
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    (folder / "site.toml").write_text(tomli_w.dumps({"name": name, "labels": "labels.csv", "limits": LIMITS}))
