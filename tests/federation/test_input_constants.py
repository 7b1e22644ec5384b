"""Runs whose constants of inputs come from sums over three small hospitals, in process."""

import json
import tomllib

import numpy as np
import pytest
import safetensors.numpy
import tomli_w

from panfm.config import load_run
from panfm.data.cache import open_store
from panfm.errors import RunError
from panfm.evaluate.input_sums import measured_constants, neutral_constants
from server import input_constants
from server.run_folder import RunFolder
from simulations.engines.local import run as run_local
from tests.federation.conftest import SUMMED


@pytest.fixture
def open_sites(federation):
    """Lets the sums of inputs leave the three hospitals."""
    for folder in sorted(federation.sites.iterdir()):
        set_limits(folder, **{"may-leave": ["updates", "counts", "loss", "saliency", "input-sums"]})
    return federation


def set_limits(folder, **limits):
    table = tomllib.loads((folder / "site.toml").read_text())
    table["limits"] |= limits
    (folder / "site.toml").write_text(tomli_w.dumps(table))


def constants_of(path):
    run = load_run(path)
    return {name: (list(stream.input_centre), list(stream.input_scale)) for name, stream in run.streams.items()}


def pooled(federation, names):
    run = federation.describe()
    return measured_constants(run, [open_store(federation.sites / name, run.streams) for name in names])


def test_constants_are_those_of_all_images_in_one_place(open_sites):
    """Beta gives none, so that its hearts are not in; the model's description, and so exports, have the constants."""
    set_limits(open_sites.sites / "beta", **{"may-leave": ["updates", "counts"]})
    run_dir = open_sites.run("summed", *SUMMED, "train.rounds=1")
    expected = pooled(open_sites, ("alpha", "gamma"))
    for path in ("run.toml", "model/run.toml", "checkpoint/run.toml"):
        assert constants_of(run_dir / path) == expected
    noted = json.loads((run_dir / "inputs.json").read_text())
    assert noted["left-out"] == {"beta": "LimitError: this site's limits.may-leave lacks input-sums"}
    assert noted["streams"]["brain-mr"]["sites"] == ["alpha", "gamma"]
    assert noted["streams"]["heart-mr"]["sites"] == ["alpha"]
    assert set(RunFolder.resume(run_dir).rounds()[0]["sites"]) == {"alpha", "beta", "gamma"}


def test_a_stream_that_no_site_gives_ends_the_run_before_round_1(open_sites):
    for name in ("alpha", "beta"):
        set_limits(open_sites.sites / name, **{"may-leave": ["updates", "counts"]})
    reason = (
        "^input-constants: no site gave sums of heart-mr, write input-centre and input-scale: "
        "alpha: LimitError: this site's limits.may-leave lacks input-sums; beta: "
    )
    with pytest.raises(RunError, match=reason):
        open_sites.run("closed", *SUMMED)


@pytest.mark.slow
def test_a_stream_of_no_site_keeps_its_inputs(open_sites):
    eye = "streams.eye-fundus={ shape = [8, 8], patch = [4, 4], channels = 3, input-constants = 'summed' }"
    run_dir = open_sites.run("absent", eye, "train.rounds=1")
    run = load_run(run_dir / "run.toml")
    centre, scale = neutral_constants(run, "eye-fundus")
    assert (run.streams["eye-fundus"].input_centre, run.streams["eye-fundus"].input_scale) == (
        tuple(centre),
        tuple(scale),
    )
    assert run.streams["brain-mr"].input_centre is None


@pytest.mark.slow
@pytest.mark.parametrize("place", ["before they are written", "between the two descriptions", "in round 1"])
def test_a_run_that_was_killed_has_the_bits_of_an_undisturbed_one(open_sites, monkeypatch, place):
    undisturbed = open_sites.run("undisturbed", *SUMMED, "train.rounds=2")
    job = open_sites.job("killed", *SUMMED, "train.rounds=2")

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if place == "before they are written":
            patched.setattr(RunFolder, "fill_in_constants", stop)
        elif place == "in round 1":
            patched.setattr("server.round_attempt.train_round", stop)
        else:
            patched.setattr(RunFolder, "describe", describe_once)
        with pytest.raises(KeyboardInterrupt):
            run_local(job)
    run_local(job)
    one, other = (
        safetensors.numpy.load((folder / "model" / "model.safetensors").read_bytes())
        for folder in (undisturbed, job.run_dir)
    )
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert constants_of(job.run_dir / "run.toml") == constants_of(job.run_dir / "checkpoint" / "run.toml")


def describe_once(folder):
    """Write the first of the two descriptions and die."""
    from panfm.config import dump_toml

    (folder.path / "checkpoint" / "run.toml").write_text(dump_toml(folder.run))
    raise KeyboardInterrupt


@pytest.mark.slow
def test_one_site_has_its_own_constants(open_sites):
    for name in ("beta", "gamma"):
        (open_sites.sites / name / "site.toml").unlink()
    run_dir = open_sites.run("one", *SUMMED, "train.rounds=1", "federation.min-sites=1")
    assert constants_of(run_dir / "run.toml")["heart-mr"] == pooled(open_sites, ("alpha",))["heart-mr"]


@pytest.mark.slow
def test_a_site_that_answers_badly_is_left_out(open_sites, monkeypatch):
    real = input_constants.ask_input_sums

    def forged(*words, **more):
        answers = real(*words, **more)
        answers.replies["beta"].inputs["heart-mr"]["count"] = np.array([1e6])
        return answers

    monkeypatch.setattr(input_constants, "ask_input_sums", forged)
    run_dir = open_sites.run("forged", *SUMMED, "train.rounds=1")
    noted = json.loads((run_dir / "inputs.json").read_text())
    assert noted["left-out"]["beta"].startswith("input sums: of 1e+06 values, expected")
    assert constants_of(run_dir / "run.toml")["heart-mr"] == pooled(open_sites, ("alpha",))["heart-mr"]
