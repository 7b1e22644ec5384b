"""A federation that starts from a model that was trained before, and trains a part of it privately."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from panfm.errors import DataError
from panfm.models import build_model
from panfm.privacy.private_step import gradient_parameters
from server.run_folder import RunFolder
from simulations.engines.local import run as run_local
from simulations.finish import train_site_alone
from tests.federation.test_private import PRIVATE

ROOMY = tuple("patient-dp.epsilon=1000.0" if change.startswith("patient-dp.epsilon") else change for change in PRIVATE)


def tensors(run_dir):
    return safetensors.numpy.load((run_dir / "model" / "model.safetensors").read_bytes())


@pytest.fixture
def public(federation):
    """A model folder, and what a run must say to start from it."""
    return federation.run("public", "train.rounds=1") / "model"


@pytest.mark.slow
@pytest.mark.parametrize("parts", ['{ kind = "vectors" }', '{ kind = "last-blocks", blocks = 1 }'])
def test_what_a_private_run_does_not_train_keeps_the_bits_of_its_start(federation, public, parts):
    warm = (f"start.model={public}", f"train.parts={parts}", "train.rounds=2")
    folder = federation.run("private", *ROOMY, *warm, "sharing.coding=int8")
    run = RunFolder.resume(folder).run
    moving = gradient_parameters(build_model(run))
    before, after = tensors(public.parent), tensors(folder)
    assert len(json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])["sites"]) == 3
    for name, value in after.items():
        assert np.array_equal(value, before[name]) == (name not in moving), name
    metadata = json.loads((folder / "model" / "metadata.json").read_text())
    assert metadata["start"] == run.start.sha256


def test_a_run_that_was_stopped_before_round_1_has_its_start_in_its_folder(federation, public):
    job = federation.job("later", f"start.model={public}", "train.rounds=1", "train.learning-rate=1e-9")
    before = tensors(public.parent)
    shutil.rmtree(public.parent)
    run_local(job)
    for name, value in tensors(job.run_dir).items():
        np.testing.assert_allclose(value, before[name], atol=1e-7)
    (job.run_dir / "start.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"^start\.sha256: the weights have"):
        RunFolder.resume(job.run_dir).start()


def test_a_start_that_does_not_fit_leaves_no_run_folder(federation, public):
    with pytest.raises(DataError, match=r"has another \[model\]"):
        federation.job("unfit", f"start.model={public}", "model.size=tiny")
    assert not (federation.folder / "unfit").exists()


def test_a_site_alone_starts_there_too_and_without_noise(federation, public):
    from panfm.config import dump_toml
    from simulations.finish import AloneJob

    job = federation.job("warm", *ROOMY, f"start.model={public}", "train.rounds=1", "train.learning-rate=1e-9")
    run = RunFolder.resume(job.run_dir).run
    model = train_site_alone(AloneJob(dump_toml(run), federation.sites / "beta", job.run_dir))
    before = tensors(public.parent)
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(value.numpy(), before[name], atol=1e-7)
