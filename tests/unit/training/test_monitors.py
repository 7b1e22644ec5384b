import math

import numpy as np
import pytest
import torch

from panfm.training.monitors import NAMES, expert_monitors, feature_monitors
from panfm.training.trainer import Trainer

CROSS = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])


def test_features_by_hand():
    """Two equal singular values; deviations sqrt(1/2), sqrt(1/2) and 0 of three features of unit rows."""
    assert feature_monitors(CROSS) == {
        "effective-rank": pytest.approx(2.0),
        "feature-deviation": pytest.approx(math.sqrt(3) * 2 * math.sqrt(0.5) / 3),
    }
    assert feature_monitors(7.0 * CROSS) == pytest.approx(feature_monitors(CROSS))


def test_collapsed_features_by_hand():
    assert feature_monitors(np.full((5, 3), 0.1)) == {
        "effective-rank": 0.0,
        "feature-deviation": pytest.approx(0.0, abs=1e-12),
    }
    line = np.arange(4.0)[:, None] @ np.ones((1, 5)) + 1
    assert feature_monitors(line)["effective-rank"] == pytest.approx(1.0)
    assert feature_monitors(line)["feature-deviation"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    "features", [np.zeros((0, 3)), np.ones((1, 3)), [[1.0, np.nan], [0, 1]], [[np.inf, 0], [0, 1]]]
)
def test_what_cannot_be_told_is_left_out(features):
    assert feature_monitors(np.array(features)) == {}


def test_all_zero_features_are_no_error():
    assert feature_monitors(np.zeros((3, 2))) == {"effective-rank": 0.0, "feature-deviation": 0.0}


def test_experts_by_hand():
    assert expert_monitors({"a": [1.0, 1.0, 0.0], "b": [5.0, 0.0, 0.0]}) == {"experts-used": pytest.approx(1.5)}
    assert expert_monitors({}) == expert_monitors({"a": [0.0, 0.0]}) == {}
    assert set(feature_monitors(CROSS)) | set(expert_monitors({"a": [1.0]})) <= set(NAMES)


def train(make_run, make_store, objective, *, with_monitors=True):
    run = make_run(f'[objective]\nname = "{objective}"\n')
    trainer, store = Trainer(run), make_store(run)
    result = trainer.train(
        store,
        store.indices("train"),
        first_step=0,
        num_steps=2,
        site="a",
        round_number=1,
        with_monitors=with_monitors,
    )
    return trainer, result


@pytest.mark.parametrize("objective", ["latent", "dino", "mae"])
def test_a_round_tells_its_monitors_and_the_training_does_not_notice(make_run, make_store, objective):
    trainer, result = train(make_run, make_store, objective)
    told = {"effective-rank", "feature-deviation"} | ({"teacher-entropy"} if objective == "dino" else set())
    assert set(result.monitors) == told
    assert 0.0 <= result.monitors.get("teacher-entropy", 0.0) <= 1.0 + 1e-6
    without, silent = train(make_run, make_store, objective, with_monitors=False)
    assert (silent.monitors, silent.saliency, silent.loss) == ({}, result.saliency, result.loss)
    for with_, silent_ in (
        (trainer.private_state(), without.private_state()),
        (trainer.shared_state(), without.shared_state()),
    ):
        assert all(torch.equal(value, silent_[name]) for name, value in with_.items())
