"""A real deployment on loopback: SuperLink, SuperNodes and workers as processes, over TLS with authentication."""

import pytest

from simulations.engines import run_job

pytestmark = pytest.mark.slow


def test_it_gives_the_bits_of_the_local_engine(federation):
    expected = federation.run("local", "train.rounds=2")
    job = federation.job("deployment", "train.rounds=2")
    run_job(job, "deployment")
    model = "model/model.safetensors"
    assert (job.run_dir / model).read_bytes() == (expected / model).read_bytes()
