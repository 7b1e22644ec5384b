"""Answers with sums: what is read from them, and which are refused."""

import numpy as np
import pytest

from panfm.config import RunConfig, StreamConfig
from panfm.config.gate import GateConfig
from panfm.config.probe import ProbeConfig
from panfm.errors import ConfigError
from panfm.evaluate.label_sums import LabelSums
from panfm.sharing.sums_messages import SumsReply
from server.checkpoint import Measure, ServerState, load_latest, save_state
from server.exchange import Answers, check_sums_fit, label_sums
from server.round_gate import RoundGate, _loss

STREAM = StreamConfig(shape=(8, 8), patch=(4, 4))
RUN = RunConfig(
    name="toy",
    streams={"brain-mr": STREAM},
    probe=ProbeConfig(tasks={"old": ("old",), "pair": ("a", "b")}),
    gate=GateConfig(measure="labels"),
)


def reply(task="old", labels=1, patients=5, size=3, **changed):
    random = np.random.default_rng(patients)
    sums = LabelSums.of(random.normal(size=(patients, size)), random.integers(0, 2, (patients, labels)).astype(float))
    return SumsReply("run-1", 1, {task: {**sums.to_arrays(), **changed}})


def read(**replies):
    return label_sums(RUN, 3, dict.fromkeys(replies, 5), Answers(replies, {"away": "offline"}, 0.0))


def test_sums_are_read_by_site_and_task():
    sums = read(alpha=reply(), beta=reply("pair", 2))
    assert (list(sums.by_site), dict(sums.failed)) == (["alpha", "beta"], {"away": "offline"})
    assert list(sums.of_task("old")) == ["alpha"]
    assert sums.of_task("old")["alpha"].xx.shape == (3, 3)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (reply(patients=6), "label sums: of 6 patients, the site has 5"),
        (reply("height"), "label sums of 'height', which the run does not name"),
        (reply("pair", 1), "message: y is float64 [1], expected float64 [2]"),
        (reply(xx=np.full((3, 3), np.nan)), "message: xx holds NaN or inf, expected finite numbers"),
        (reply(x=np.ones(3, np.float32)), "message: x is float32 [3], expected float64 [3]"),
        (reply(x=np.full(3, 1e9)), "label sums: found sums and sums of products that no patients have together"),
        (SumsReply("run-1", 1), "label sums: of no task"),
    ],
)
def test_sums_that_do_not_hold_are_refused_and_the_others_count(bad, reason):
    sums = read(alpha=bad, beta=reply())
    assert (list(sums.by_site), sums.failed["alpha"]) == (["beta"], reason)


def test_sums_that_are_too_large_are_told_before_round_1():
    check_sums_fit(RUN, 48)
    check_sums_fit(RUN.model_copy(update={"probe": ProbeConfig()}), 10_000)
    with pytest.raises(ConfigError, match=r"^probe\.tasks: embeddings have 5000 numbers, expected at most 4096"):
        check_sums_fit(RUN, 5000)


def test_a_loss_of_no_patients_is_refused():
    assert _loss(SumsReply("r", 1, loss=2.5, loss_subjects=2)) == (2.5, 2)
    for bad in ({}, {"loss": float("nan"), "loss_subjects": 1}, {"loss": 1.0, "loss_subjects": 0}):
        answers = Answers({"alpha": SumsReply("r", 1, **bad)}, {}, 0.0)
        assert answers.read(_loss) == ({}, {"alpha": "validation loss: missing, not finite, or of no patients"})


def test_the_measure_is_the_mean_loss_or_error_of_all_patients():
    run = RUN.model_copy(update={"gate": GateConfig(measure="validation-loss")})
    gate = RoundGate(None, run, {}, 3)
    assert gate._value({"a": (2.0, 2), "b": (4.0, 1)}) == 2.0
    assert np.isnan(gate._value({}))
    labelled = RoundGate(None, RUN, {}, 3)
    sums = {name: {"old": LabelSums.of(*drawn(seed))} for seed, name in enumerate("abc")}
    assert np.isfinite(labelled._value(sums))


def drawn(seed):
    random = np.random.default_rng(seed)
    return random.normal(size=(9, 3)), random.integers(0, 2, (9, 1)).astype(float)


def test_the_measure_is_in_the_checkpoint(tmp_path):
    measure = Measure(0.5, 3, {"alpha": {"old": 5}})
    save_state(tmp_path, ServerState("run-1", 4, {"backbone": np.ones(2, np.float32)}, measure=measure))
    assert load_latest(tmp_path).measure == measure
