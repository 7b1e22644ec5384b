"""The job that frameworks share: sizes, the same model in the plain loop and here, and what cannot be installed."""

import io
import sys
import time

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from panfm.models.sizes import sizes_of
from panfm.training.trainer import Trainer
from simulations.__main__ import app
from simulations.bench import peers
from simulations.bench.peer_jobs import measured_process


@pytest.mark.parametrize(("size", "least", "most"), [("1", 0.5, 2.0), ("20", 18.0, 30.0), ("100", 85.0, 115.0)])
def test_models_have_about_the_size_that_they_are_called(size, least, most):
    assert least <= 4e-6 * sizes_of(peers.describe(size, 2, 1)).parameters <= most


def test_the_difference_is_relative_to_what_training_moved():
    run = peers.describe("1", 1, 1)
    start = Trainer(run).shared_state()
    plain = {name: value + 1.0 for name, value in start.items()}
    near = {name: value + 0.1 for name, value in plain.items()}
    assert peers.difference(plain, plain, run) == 0.0
    assert peers.difference(near, plain, run) == pytest.approx(0.1, rel=1e-4)


def test_what_cannot_be_installed_is_named_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "_install", lambda package, environment: f"ERROR: No matching distribution: {package}")
    pythons, absent = peers.installed(["plain", "pfl"], tmp_path, Console(file=io.StringIO()))
    assert pythons == {"plain": sys.executable}
    assert absent == {"pfl": "cannot be installed: ERROR: No matching distribution: pfl[pytorch]"}


def test_an_environment_that_is_there_is_used_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(peers, "_install", lambda package, environment: made.append(environment.mkdir()) or "")
    for _ in range(2):
        pythons, absent = peers.installed(["pfl"], tmp_path, Console(file=io.StringIO()))
    assert (len(made), absent) == (1, {})
    assert pythons == {"pfl": str(tmp_path / "pfl" / "bin" / "python")}


@pytest.mark.parametrize(("option", "value"), [("--arms", "fedlob"), ("--sizes", "3")])
def test_unknown_names_are_refused(option, value):
    done = CliRunner().invoke(app, ["bench", "peers", option, value])
    assert done.exit_code == 2
    assert f"{value}: expected some of" in done.output


def test_processes_of_a_command_are_looked_at():
    with measured_process.subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1) as process:
        time.sleep(0.2)
        assert process.pid in measured_process._descendants()
        assert measured_process._proportional_kib(process.pid) > 100
        seen = measured_process.Seen()
        seen.look()
        assert seen.peak_kib > 100
        assert next(seconds for (pid, _), seconds in seen.cpu_seconds.items() if pid == process.pid) < 5.0
        process.communicate(b"\n")
    assert measured_process._proportional_kib(process.pid) == 0


@pytest.mark.slow
def test_this_project_ends_with_the_model_of_the_plain_loop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peers, "SUBJECTS", 4)
    run = peers.describe("1", 2, 1)
    models = {}
    for arm in ("plain", "local"):
        taken = peers.run_arm(arm, sys.executable, run, tmp_path)
        assert taken["cpu_seconds"] > 0.5
        models[arm] = torch.load(tmp_path / "model.pt")
    assert peers.difference(models["local"], models["plain"], run) < 0.05
