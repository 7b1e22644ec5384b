"""Runs with a gate and with a probe of labels over three small hospitals, in process."""

import json

import numpy as np
import pytest
import safetensors.numpy
from numpy.testing import assert_allclose
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from panfm.config import load_site
from panfm.data.cache import open_store
from panfm.errors import RunError
from panfm.evaluate.embed import embed_store, load_model
from panfm.evaluate.federated_probe import cross_validated_error
from panfm.evaluate.label_sums import PENALTIES, LabelSums
from panfm.evaluate.probe_file import read_probes
from panfm.files import read_checked
from panfm.models import build_model
from panfm.site.site import Site
from server.run_folder import RunFolder
from simulations.engines.local import run as run_local
from tests.federation.conftest import GATED, TASKS


def gates(run_dir):
    return [json.loads(line)["gate"] for line in (run_dir / "rounds.jsonl").read_text().splitlines()]


def tensors(run_dir):
    return safetensors.numpy.load((run_dir / "model" / "model.safetensors").read_bytes())


def metadata(run_dir):
    return json.loads((run_dir / "model" / "metadata.json").read_text())


@pytest.mark.slow
def test_the_probe_of_a_run_is_the_ridge_on_the_patients_of_all_sites(labelled):
    run_dir = labelled.run("probed", TASKS, "features.pooling=per-stream")
    probes = read_probes(run_dir / "model")
    assert (probes["old"].sites, probes["old"].patients) == (("alpha", "beta", "gamma"), 33)
    assert (probes["shape"].sites, probes["shape"].labels) == (("alpha", "beta"), ("round", "flat"))
    assert metadata(run_dir)["probe"]["tasks"]["old"]["patients"] == 33
    assert metadata(run_dir)["probe"]["left-out"] == {}
    features, truth = everybody(labelled, load_model(run_dir / "model")[0], ("alpha", "beta", "gamma"))
    scaler = StandardScaler().fit(features)
    ridge = RidgeCV(alphas=PENALTIES).fit(scaler.transform(features), truth[:, 0])
    assert probes["old"].penalty == pytest.approx(ridge.alpha_)
    assert_allclose(
        probes["old"].probe.score(features)[:, 0], ridge.predict(scaler.transform(features)).ravel(), atol=1e-6
    )


def plan(monkeypatch, *values):
    """Let the measures of the models be these, whatever the sites give."""
    planned = iter(values)

    def measured(gate, contributions):
        assert contributions
        if (value := next(planned)) is None:
            raise KeyboardInterrupt
        return value

    monkeypatch.setattr("server.round_gate.RoundGate._value", measured)


@pytest.mark.slow
def test_a_round_that_makes_the_model_worse_is_not_kept(labelled, monkeypatch):
    """Parameters and the optimiser's slots come back, and the model that is kept is released."""
    plan(monkeypatch, 0.9, 0.8, 0.85)
    run_dir = labelled.run("worse", TASKS, GATED, "train.rounds=2", "sharing.optimiser.kind=momentum")
    first, second = gates(run_dir)
    assert (first["before"], first["measure"], first["kept"]) == (0.9, 0.8, True)
    assert (second["before"], second["measure"], second["kept"], second["missing"]) == (0.8, 0.85, False, {})
    assert metadata(run_dir)["gate"] == {"measure": 0.8, "round": 1}
    state = RunFolder.resume(run_dir).latest_state()
    assert (state.round_number, state.measure.round_number) == (2, 1)
    assert state.measure.patients["gamma"] == {"old": 11}
    one, two, start = (checkpoint(run_dir, number) for number in (1, 2, 0))
    assert "momentum/backbone" in one
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(one["global/backbone"], start["global/backbone"])


@pytest.mark.slow
def test_the_measure_of_a_gate_is_the_error_of_the_ridge_on_all_patients(labelled):
    run_dir = labelled.run("measured", TASKS, GATED, "train.rounds=1")
    [gate] = gates(run_dir)
    model = build_model(labelled.describe())
    features, truth = everybody(labelled, model, ("alpha", "beta", "gamma"))
    both, pair = everybody(labelled, model, ("alpha", "beta"), columns=(2, 3))
    errors = [cross_validated_error([LabelSums.of(*them)]) for them in ((features, truth), (both, pair))]
    assert gate["before"] == pytest.approx(np.mean(errors), rel=1e-6)
    assert gate["kept"] == (gate["measure"] <= gate["before"])


def everybody(labelled, model, names, columns=(1,)):
    """Features and labels of the training patients of some sites."""
    features, truth = [], []
    for name in names:
        store = open_store(labelled.sites / name, labelled.describe().streams)
        at = store.indices("train")
        table = np.genfromtxt(labelled.sites / name / "labels.csv", delimiter=",", skip_header=1)
        features.append(embed_store(model, store, at, batch_size=3).astype(np.float64))
        truth.append(table[np.ix_(at, columns)])
    return np.concatenate(features), np.concatenate(truth)


def checkpoint(run_dir, number):
    """Arrays of the server's state after a round: parameters, and slots of its optimisers."""
    content = read_checked(run_dir / "checkpoint" / f"round-{number:06d}.state")
    return safetensors.numpy.load(content.partition(b"\n")[2])


@pytest.mark.slow
def test_without_a_gate_or_with_one_that_keeps_all_rounds_the_model_has_the_same_bits(labelled, monkeypatch):
    plain = tensors(labelled.run("plain"))
    monkeypatch.setattr("server.round_gate.cross_validated_error", lambda sums: 1.0)
    gated = tensors(labelled.run("gated", TASKS, GATED))
    assert all(np.array_equal(plain[name], gated[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["labels", "validation-loss"])
def test_a_gated_run_that_is_resumed_has_the_bits_of_an_undisturbed_one(labelled, monkeypatch, measure):
    """The server dies after a round that was not kept, before the gate of the next one has decided."""
    parts = 'train.parts={ kind = "last-blocks", blocks = 1 }'
    overrides = (parts, "sharing.coding=int8", f"gate.measure={measure}", TASKS)
    plan(monkeypatch, 0.5, 0.6, 0.4, 0.3)
    undisturbed = labelled.run("undisturbed", *overrides)
    assert [gate["kept"] for gate in gates(undisturbed)] == [False, True, True]
    plan(monkeypatch, 0.5, 0.6, None)
    job = labelled.job("killed", *overrides)
    with pytest.raises(KeyboardInterrupt):
        run_local(job)
    plan(monkeypatch, 0.4, 0.3)
    run_local(job)
    assert [gate["kept"] for gate in gates(job.run_dir)] == [False, True, True]
    one, other = tensors(undisturbed), tensors(job.run_dir)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert metadata(job.run_dir)["gate"] == {"measure": 0.3, "round": 3}


@pytest.mark.slow
def test_a_site_whose_operator_names_no_label_sums_gives_none_and_trains(labelled):
    toml = labelled.sites / "beta" / "site.toml"
    toml.write_text(toml.read_text().replace('    "label-sums",\n', ""))
    assert "label-sums" not in load_site(labelled.sites / "beta").limits.may_leave
    run_dir = labelled.run("partly", TASKS, GATED, "train.rounds=1")
    reason = "LimitError: this site's limits.may-leave lacks label-sums"
    assert metadata(run_dir)["probe"]["left-out"] == {"beta": reason}
    assert read_probes(run_dir / "model")["old"].sites == ("alpha", "gamma")
    assert RunFolder.resume(run_dir).latest_state().measure.patients.keys() == {"alpha", "gamma"}
    assert set(RunFolder.resume(run_dir).rounds()[0]["sites"]) == {"alpha", "beta", "gamma"}


def test_a_gate_that_no_site_can_feed_ends_the_run_before_round_1(labelled):
    for name in ("alpha", "beta", "gamma"):
        (labelled.sites / name / "labels.csv").unlink()
        toml = labelled.sites / name / "site.toml"
        toml.write_text(toml.read_text().replace('labels = "labels.csv"\n', ""))
    with pytest.raises(RunError, match=r"^gate\.measure: no site's patients measure the start: alpha: LimitError"):
        labelled.run("fed", TASKS, GATED)


@pytest.mark.slow
def test_a_round_without_one_of_the_sites_of_the_measure_is_not_kept(labelled, monkeypatch):
    give = Site.give_sums

    def sometimes(site, question):
        if site.config.name == "beta" and question.config["round"] == 2:
            raise RuntimeError
        return give(site, question)

    monkeypatch.setattr(Site, "give_sums", sometimes)
    [first, second] = gates(labelled.run("away", TASKS, GATED, "train.rounds=2"))
    assert (first["kept"], first["missing"]) == (False, {"beta": "internal error (RuntimeError)"})
    assert second["missing"] == {}
