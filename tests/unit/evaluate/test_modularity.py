import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from panfm.evaluate.representation import expert_modality_nmi, gradient_conflict, layer_gradients
from panfm.training.monitors import experts_used


def test_conflict_by_hand():
    gradients = np.array([[1.0, 0.0], [-3.0, 0.0], [0.0, 2.0]])
    found = gradient_conflict(gradients)
    assert found.share == pytest.approx(1 / 3)
    assert found.size == pytest.approx(1 / 3)
    assert found.cosine == pytest.approx(-1 / 3)


def test_conflict_against_a_slow_reference():
    gradients = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32)
    cosines = [
        sum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other)
        for one, other in itertools.combinations(gradients.tolist(), 2)
    ]
    found = gradient_conflict(gradients, margin=0.1)
    assert found.share == pytest.approx(sum(each < -0.1 for each in cosines) / 15)
    assert found.size == pytest.approx(sum(max(0.0, -each) for each in cosines) / 15)
    assert found.cosine == pytest.approx(sum(cosines) / 15)


def test_conflict_does_not_see_lengths_and_leaves_idle_modalities_out():
    gradients = np.random.default_rng(1).normal(size=(4, 5))
    longer = np.concatenate([gradients * [[1.0], [7.0], [0.1], [1.0]], np.zeros((2, 5))])
    before, after = gradient_conflict(gradients), gradient_conflict(longer)
    assert (before.share, before.size, before.cosine) == pytest.approx((after.share, after.size, after.cosine))


def test_cosines_within_the_margin_count_for_no_share():
    gradients = np.array([[1.0, 0.0], [-0.04, 1.0]])
    assert gradient_conflict(gradients).share == 0.0
    assert gradient_conflict(gradients, margin=0.0).share == 1.0


POISONED = [np.array([[1.0, 0.0], [-1.0, 0.0], [bad, 1.0]]) for bad in (np.nan, np.inf)]


@pytest.mark.parametrize("gradients", [np.zeros((3, 4)), np.ones((1, 4)), np.zeros((0, 4)), *POISONED])
def test_no_pair_is_nan_and_poison_is_not_idle(gradients):
    found = gradient_conflict(gradients)
    assert np.isnan([found.share, found.size, found.cosine]).all()


def test_layer_gradients_by_hand():
    first, second, third = (torch.tensor([value], requires_grad=True) for value in (2.0, 3.0, 5.0))
    losses = {"a": lambda: (first * second).sum(), "b": lambda: (second**2 + third).sum()}
    one, two = layer_gradients(losses, [[first, second], iter([third])])
    np.testing.assert_array_equal(one, [[3.0, 2.0], [0.0, 6.0]])
    np.testing.assert_array_equal(two, [[0.0], [1.0]])
    assert one.dtype == np.float32
    assert first.grad is second.grad is third.grad is None


@pytest.mark.parametrize("seed", range(5))
def test_nmi_against_scikit_learn(seed):
    random = np.random.default_rng(seed)
    modality = random.integers(0, 4, 60)
    gates = random.random((60, 8)) + 1.5 * np.eye(8)[modality] * (seed / 4)
    expected = normalized_mutual_info_score(modality, gates.argmax(axis=1))
    assert expert_modality_nmi(gates, modality) == pytest.approx(expected, abs=1e-12)


def test_nmi_by_hand():
    own, shared = np.eye(4)[[0, 1, 2, 3]], np.eye(4)[[0, 0, 1, 1]]
    names = ["ct", "mr", "pet", "oct"]
    assert expert_modality_nmi(own, names) == pytest.approx(1.0)
    assert expert_modality_nmi(shared, names) == pytest.approx(2 / 3)
    assert expert_modality_nmi(own[[0, 0, 0, 0]], names) == 0.0
    assert expert_modality_nmi(own, ["ct"] * 4) == 0.0
    assert [expert_modality_nmi(own[[0] * number], ["ct"] * number) for number in range(1, 50)] == [0.0] * 49
    assert expert_modality_nmi(np.eye(2)[[0, 1, 0, 1]], ["ct", "ct", "mr", "mr"]) == 0.0


def test_experts_used_by_hand():
    assert experts_used(np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
    assert experts_used(np.eye(8)) == pytest.approx(8.0)
    assert experts_used(np.eye(8)[[2, 2]]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "measure", [lambda gates: expert_modality_nmi(gates, ["ct", "mr", "pet"][: len(gates)]), experts_used]
)
@pytest.mark.parametrize("gates", [np.zeros((0, 2)), *POISONED])
def test_gates_of_nobody_or_not_finite_tell_nothing(measure, gates):
    assert np.isnan(measure(gates))
