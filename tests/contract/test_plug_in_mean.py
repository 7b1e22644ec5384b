"""A mean of one's own costs its file and a line of the registry."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from panfm.errors import ConfigError
from panfm.registry import MEANS, Registry
from strategies.group_means import BufferedMean
from tests.cases import copy_packages

HOUSE = ("panfm", "strategies", "server", "client", "simulations")
MEAN = '''
"""Midrange: the middle between the smallest and the largest of each number."""

from collections.abc import Sequence

import numpy as np

from panfm.sharing.groups import Flat
from strategies.group_means import BufferedMean


class Midrange(BufferedMean):
    """Middle between the extremes."""

    uses_weights = False

    def combine(self, updates: Sequence[Flat], weights: Sequence[float]) -> Flat:
        """One vote per site."""
        return (np.min(updates, axis=0) + np.max(updates, axis=0)) / np.float32(2.0)
'''
STREAM = "{ spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }"
RUN = f"""
name = "small"
[streams]
brain-mr = {STREAM}
heart-mr = {STREAM}
[train]
rounds = 1
local-steps = 1
batch-size = 3
[sharing]
mean = "midrange"
[federation]
max-weight = 100.0
[sharing.groups.head]
mean = "weighted"
"""
PROGRAM = """
import json
import sys
from pathlib import Path
import numpy as np
import strategies.grouped as grouped
from panfm.config import load_run
from server.run_folder import RunFolder
from simulations.engines.job import Job
from simulations.engines.local import run

used = {}

def make_mean(sharing, group, setup):
    mean = plain(sharing, group, setup)
    used[group] = type(mean).__name__
    return mean

plain, grouped.make_mean = grouped.make_mean, make_mean
RunFolder.create(Path("run"), load_run(Path("small.toml")))
run(Job(Path(sys.argv[1]), Path("run")))
[line] = map(json.loads, Path("run/rounds.jsonl").read_text().splitlines())
shares = {site: [reply["shares"]["backbone"], reply["shares"]["head"]] for site, reply in line["sites"].items()}
print(json.dumps([used, shares, Path("run/model/model.safetensors").exists()]))
"""


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_mean_costs_two_files(tmp_path, write_site):
    """One round of three sites; their shares show that weights do not count in the new mean."""
    sites, copy = tmp_path / "sites", tmp_path / "copy"
    for name, num_subjects in (("alpha", 3), ("beta", 3), ("gamma", 5)):
        write_site(sites / name, name, ("brain", "heart"), num_subjects)
    copy_packages(copy, *HOUSE)
    before = contents(copy)
    (copy / "strategies" / "midrange.py").write_text(MEAN)
    registry = copy / "panfm" / "registry.py"
    line = '"weighted": '
    assert registry.read_text().count(line) == 1
    registry.write_text(registry.read_text().replace(line, f'"midrange": "strategies.midrange:Midrange",\n{line}'))
    after = contents(copy)
    assert len([path for path in after if before.get(path) != after[path]]) == 2
    (copy / "small.toml").write_text(RUN)
    command = [sys.executable, "-c", PROGRAM, str(sites)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=copy, check=False)
    assert done.returncode == 0, done.stderr
    used, shares, has_model = json.loads(done.stdout.splitlines()[-1])
    assert used.pop("head") == "WeightedMean"
    assert set(used.values()) == {"Midrange"}
    assert all(backbone == pytest.approx(1 / 3, abs=1e-6) for backbone, _ in shares.values())
    assert shares["gamma"][1] > shares["alpha"][1] == shares["beta"][1]
    assert has_model


def test_every_named_mean_is_there():
    assert MEANS.names == ("weighted", "median", "trimmed", "geometric-median", "l-dawa")
    for name in MEANS.names:
        mean = MEANS.load(name)
        assert isinstance(mean.uses_weights, bool)
        assert callable(mean.add)
        assert callable(mean.remove)
        assert callable(mean.mean)


@pytest.mark.parametrize("key", ["mean", "groups.backbone.mean"])
def test_an_unknown_mean_is_refused(make_run, key):
    """In the description, and by the registry itself: nothing is a default."""
    with pytest.raises(ConfigError, match=r"found 'medan', expected one of weighted.*did you mean 'median'"):
        make_run(f"[sharing]\n{key} = 'medan'\n")
    with pytest.raises(ConfigError, match="found 'medan'"):
        MEANS.load("medan")


def test_a_mean_may_be_registered_before_the_description_is_read(make_run, monkeypatch):
    copy = Registry(MEANS.key, {name: MEANS.load(name) for name in MEANS.names})
    monkeypatch.setattr(MEANS, "_targets", copy._targets)
    MEANS.register("own", type("Own", (BufferedMean,), {"combine": lambda self, updates, weights: updates[0]}))
    assert make_run("[sharing]\nmean = 'own'\n").sharing.mean_of("backbone") == "own"
