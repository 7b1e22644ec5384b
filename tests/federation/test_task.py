"""Runs with `[task]`: three hospitals fine-tune one head; its folder predicts; engines and resumed runs agree."""

import json
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import safetensors.numpy
import tomli_w

import panfm
from panfm.config import Releasable, dump_toml, load_site
from panfm.data.cache import open_store
from panfm.errors import RunError
from panfm.evaluate.embed import load_model
from panfm.evaluate.result import read_result
from server.run_folder import RunFolder
from simulations.engines.job import Job
from simulations.engines.local import run as run_local
from simulations.task_scores import predict, score_task
from tests.federation.conftest import HOLDINGS, Federation
from tests.federation.test_engines import model_bytes, simulate

TASK = 'task={ label = "old", kind = "yes-no", personal-steps = 2 }'
LIMITS = {"may-leave": [*Releasable], "smallest-batch": 1, "smallest-steps": 1, "training-labels": ["old"]}


@pytest.fixture
def labelled(tmp_path, write_site) -> Federation:
    """The three hospitals with labels of twelve patients each; gamma knows seven of its own."""
    random = np.random.default_rng(0)
    for name, organs in HOLDINGS.items():
        folder = write_site(tmp_path / "sites" / name, name, organs, subjects=12)
        cells = [str(value) for value in random.integers(0, 2, 12)]
        if name == "gamma":
            cells[:5] = [""] * 5
        rows = [f"{name}-{number},{cell}" for number, cell in enumerate(cells)]
        (folder / "labels.csv").write_text("\n".join(["subject,old", *rows]) + "\n")
        (folder / "site.toml").write_text(tomli_w.dumps({"name": name, "labels": "labels.csv", "limits": LIMITS}))
    return Federation(tmp_path)


def tensors(run_dir):
    return safetensors.numpy.load(model_bytes(run_dir))


def test_a_run_trains_the_head_and_its_folder_predicts(labelled):
    folder = labelled.run("task", TASK, "train.rounds=2")
    sites = json.loads((folder / "sites.json").read_text())["sites"]
    assert {name: site["subjects"] for name, site in sites.items()} == {"alpha": 11, "beta": 11, "gamma": 6}
    assert tensors(folder)["heads.task.weight"].any()
    model = panfm.load(folder)
    assert (model.task.kind, model.task.outputs, model.metadata["task"]) == ("yes-no", ("old",), "old")
    site = labelled.sites / "beta"
    predicted = model.predict(site)
    raw, run = load_model(folder / "model")
    store = open_store(site, run.streams)
    np.testing.assert_allclose(predicted, predict(run.task, raw, store, np.arange(12)), atol=1e-6)
    assert 0.0 < predicted.min() < predicted.max() < 1.0
    scores = score_task(run, {"federated": raw, "site:beta": raw}, {"alpha": raw}, _with_holdout(labelled))
    assert {(score.arm, score.group, score.metric) for score in scores} >= {
        ("federated", "holdout", "auc"),
        ("federated", "site:beta", "accuracy"),
        ("personalised", "site:alpha", "accuracy"),
        ("federated minus own", "site:beta", "auc"),
    }


def _with_holdout(labelled) -> Path:
    """The cohort's folder, with held-out patients that are like alpha's: other names and other voxels."""
    holdout = labelled.folder / "holdout"
    shutil.copytree(labelled.sites / "alpha", holdout)
    for table in ("manifest.csv", "labels.csv"):
        text = re.sub("^alpha-", "held-", (holdout / table).read_text(), flags=re.MULTILINE)
        (holdout / table).write_text(text.replace(",train", ",test").replace(",val", ",test"))
    for path in holdout.rglob("*.nii.gz"):
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) + np.int16(1), image.affine), path)
    return labelled.folder


@pytest.mark.slow
def test_a_run_starts_from_a_models_encoder_and_goes_on_after_a_crash_with_the_same_bits(labelled, monkeypatch):
    start = labelled.run("start", "train.rounds=1") / "model"
    warm = (TASK, f"start.model={start}", "train.parts=head", "train.rounds=2")
    expected = labelled.run("whole", *warm)
    before, after = tensors(start.parent), tensors(expected)
    assert all(np.array_equal(value, before[name]) for name, value in after.items() if not name.startswith("heads."))
    assert after["heads.task.weight"].any()
    job = labelled.job("stopped", *warm)
    save, calls = RunFolder.save_state, []

    def fail(self, state):
        save(self, state)
        if len(calls) == 1:
            raise RunError("stopped")
        calls.append(state.round_number)

    monkeypatch.setattr(RunFolder, "save_state", fail)
    with pytest.raises(RunError, match="stopped"):
        run_local(job)
    monkeypatch.setattr(RunFolder, "save_state", save)
    RunFolder.resume(job.run_dir)
    run_local(Job(labelled.sites, job.run_dir))
    assert model_bytes(job.run_dir) == model_bytes(expected)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("engine", ["ray", "flower", "deployment"])
def test_engines_agree_on_a_task_to_the_bit(labelled, engine):
    asked = (TASK, "train.rounds=2", "federation.join-timeout-s=200.0")
    expected = labelled.run("local", *asked)
    done = simulate(labelled, engine, engine, *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert model_bytes(labelled.folder / engine) == model_bytes(expected)
    for name in ("head.safetensors", "task.json"):
        assert (labelled.folder / engine / "model" / name).read_bytes() == (expected / "model" / name).read_bytes()


@pytest.mark.slow
def test_a_simulation_scores_the_task_on_the_hold_out_and_at_sites(labelled):
    """A simulation scores the task; a site that may not train on the label is refused before anything is trained."""
    cohort = _with_holdout(labelled)
    done = simulate(labelled, "scored", "local", TASK, "train.rounds=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gamma: 5 of 11 training patients have no old and do not train" in done.stdout.replace("\n", " ")
    result = read_result(labelled.folder / "scored" / "probe.json")
    arms = {(score.arm, score.group) for score in result.task}
    assert {("federated", "holdout"), ("site:gamma", "holdout"), ("personalised", "site:gamma")} <= arms
    assert "gamma: its patients outside training are too few" in done.stdout.replace("\n", " ")
    assert "Predictions of old" in (labelled.folder / "scored" / "report.html").read_text()
    site = load_site(cohort / "sites" / "beta")
    closed = site.model_copy(update={"limits": site.limits.model_copy(update={"training_labels": ()})})
    (cohort / "sites" / "beta" / "site.toml").write_text(dump_toml(closed))
    refused = simulate(labelled, "refused", "local", TASK)
    assert refused.returncode == 1
    assert "site beta: task.label: this site's limits.training-labels lacks 'old'" in refused.stderr
