"""Kind 2: empty sets reach the model."""

from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from panfm.cli import main
from panfm.cli.model_arguments import open_stores
from panfm.config import parse_run
from panfm.data.store import ImageStore
from panfm.errors import NoSubjectsError
from panfm.sharing.messages import Invitation
from panfm.site.dry_run import dry_run
from panfm.site.site import Site
from simulations.alone import train_alone
from tests.unit.data.conftest import STREAM

RUN = """
name = "run"
[streams]
brain-mr = { shape = [8, 8, 8], patch = [4, 4, 4], spacing-mm = [2.0, 2.0, 2.0] }
[train]
rounds = 1
local-steps = 1
batch-size = 2
"""
TOLD = "found no subject in the train split that holds one of brain-mr, expected at least one"


@pytest.fixture(params=["nobody to train on", "nobody to train on with the run's streams"])
def empty(site, request):
    site.add("a", split="val")
    site.add("b", "heart-mr", split="train" if "streams" in request.param else "test")
    (site.folder / "site.toml").write_text('name = "clinic"\n[limits]\nsmallest-batch = 1\nsmallest-steps = 1\n')
    (site.folder / "run.toml").write_text(RUN)
    return site


def test_check(empty):
    line = empty.assert_one_fault(TOLD, "--run", str(empty.folder / "run.toml"))
    assert line.startswith("clinic: ")


def test_handshake_and_dry_run(empty):
    with pytest.raises(NoSubjectsError, match=TOLD):
        Site(empty.folder).handshake(Invitation(RUN))
    with pytest.raises(NoSubjectsError, match=TOLD):
        dry_run(empty.folder, parse_run(RUN))
    result = CliRunner().invoke(main, ["site", "dry-run", str(empty.folder), "--run", str(empty.folder / "run.toml")])
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)


def test_audits_and_baselines(empty):
    streams = {"brain-mr": STREAM}
    with pytest.raises(NoSubjectsError, match=TOLD):
        open_stores([empty.folder], streams, split="train")
    [store] = open_stores([empty.folder], streams)
    with pytest.raises(NoSubjectsError, match="clinic: found no subject in the train split"):
        train_alone(parse_run(RUN), store, "clinic")


def test_a_holdout_without_test_subjects(site):
    site.add("a")
    words = ["site", "check", str(site.folder), "--holdout", str(site.folder.parent / "holdout")]
    (site.folder / "site.toml").write_text('name = "north"\n')
    holdout = type(site)(site.folder.parent / "holdout")
    holdout.add("b", split="val", voxels=np.random.default_rng(5).integers(0, 99, (4, 4, 4)).astype(np.int16))
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "clinic: clinic: found no subject in the test split" in result.output


def test_a_quarantine_may_not_take_the_last_training_subject(site):
    site.add("a", split="val")
    site.add("b", voxels=np.ones((4, 4, 4), np.int16))
    result = site.check("--quarantine")
    assert result.exit_code == 1
    assert "found no subject in the train split" in result.stderr
    assert not (site.folder / "quarantine.csv").exists()


def test_members_of_a_store():
    store = ImageStore(
        ("a", "b", "c"), ("train", "train", "val"), {"x": np.zeros((1, 1, 2, 2))}, {"x": np.array([1], dtype=np.int64)}
    )
    assert store.members("train", "here").tolist() == [1]
    for split, streams, changed in (
        ("test", None, store),
        ("train", ["y"], store),
        ("train", None, replace(store, images={})),
    ):
        with pytest.raises(NoSubjectsError, match=r"^here: found no subject in the "):
            changed.members(split, "here", streams)
