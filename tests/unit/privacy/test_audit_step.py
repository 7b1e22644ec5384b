"""The canary audit: its arithmetic, and the bugs that it catches in the real step."""

import numpy as np
import pytest
from scipy.stats import binom

from panfm.config.parts import BlockPartsConfig, PlainPartsConfig
from panfm.errors import ConfigError
from panfm.privacy import private_step
from panfm.privacy.audit_step import audit_step, guess, lower_bound

CANARIES, STEPS = 300, 20


@pytest.fixture
def run(make_private):
    run = make_private()
    return run.model_copy(update={"patient_dp": run.patient_dp.model_copy(update={"noise_multiplier": 4.0})})


def audited(run):
    return audit_step(run, canaries=CANARIES, steps=STEPS)


@pytest.mark.parametrize(("guesses", "correct"), [(20, 20), (100, 90), (500, 500)])
def test_without_delta_the_bound_is_that_of_a_coin(guesses, correct):
    found = lower_bound(guesses, correct, 1000, delta=0.0, confidence=0.95)
    right = 1 / (1 + np.exp(-found))
    assert binom.sf(correct - 1, guesses, right) == pytest.approx(0.05, abs=2e-4)
    assert lower_bound(guesses, correct, 1000, delta=1e-5, confidence=0.95) <= found


@pytest.mark.parametrize("correct", [0, 10, 12])
def test_guesses_that_chance_explains_prove_nothing(correct):
    assert lower_bound(20, correct, 40, delta=1e-5, confidence=0.95) == 0.0


def test_a_large_delta_explains_everything():
    assert lower_bound(500, 500, 1000, delta=0.1, confidence=0.95) == 0.0


@pytest.mark.slow
def test_a_correct_mechanism_is_refuted_no_more_often_than_stated():
    """Randomised response of epsilon 1: the bound exceeds 1 in at most one of twenty audits."""
    random = np.random.default_rng(0)
    right = random.binomial(200, np.e / (1 + np.e), size=400)
    share = np.mean([lower_bound(200, int(each), 200, delta=0.0, confidence=0.95) > 1.0 for each in right])
    assert 0.02 < share <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


def test_the_largest_and_the_smallest_are_guessed():
    seen, present = np.array([5.0, -1.0, 0.1, 4.0, 0.0, -2.0, 3.0, 0.2]), np.array([1, 0, 1, 1, 1, 1, 0, 0], dtype=bool)
    assert guess(seen, present) == (3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["all", "vectors", "last-block"])
def test_a_correct_step_stays_under_its_claim(run, trained):
    """67 of 80 guesses would refute it: 4.7 standard deviations more than it gives. Without noise, 78 are right."""
    private = run.patient_dp.model_copy(update={"noise_multiplier": 3.0})
    parts = {
        "all": PlainPartsConfig(),
        "vectors": PlainPartsConfig(kind="vectors"),
        "last-block": BlockPartsConfig(kind="last-blocks", blocks=1),
    }
    train = run.train.model_copy(update={"parts": parts[trained]})
    found = audit_step(run.model_copy(update={"patient_dp": private, "train": train}), canaries=160, steps=8)
    assert (found.canaries, found.steps, found.guesses) == (160, 8, 80)
    assert found.lower_bound <= found.claim


LONG_BUGS = [pytest.param(bug, marks=pytest.mark.long) for bug in ("no noise", "no clipping")]


@pytest.mark.slow
@pytest.mark.parametrize("bug", ["none", "a tenth of the noise", *LONG_BUGS])
def test_a_step_that_breaks_its_promise_is_caught(run, monkeypatch, bug):
    noised, add_clipped = private_step.with_noise, private_step.add_clipped
    if bug == "no noise":
        monkeypatch.setattr(private_step, "with_noise", lambda value, deviation: value)
    elif bug == "a tenth of the noise":
        monkeypatch.setattr(private_step, "with_noise", lambda value, deviation: noised(value, deviation / 10))
    elif bug == "no clipping":
        monkeypatch.setattr(
            private_step, "add_clipped", lambda total, gradient, clip_norm: add_clipped(total, gradient, 1e9)
        )
    found = audited(run)
    assert 0.5 < found.claim < 2.0
    assert (found.lower_bound > found.claim) == (bug != "none")


def test_a_run_without_privacy_has_no_step_to_audit(make_run):
    with pytest.raises(ConfigError, match="patient-dp is missing, expected a private run"):
        audited(make_run())
