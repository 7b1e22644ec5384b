"""How much a local step is of a round's update, and which runs a site's floors let in."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from panfm.config.site_description import LimitsConfig
from panfm.config.training import TrainConfig
from panfm.errors import LimitError
from panfm.site.admission import check_floors
from panfm.site.floors import Floors, step_weights
from panfm.training.gradient import TrainResult
from panfm.training.schedules import warmup_cosine
from tests.conftest import manifest_of

FLOORS = Floors(8, 5)


def result(num_steps, counted) -> TrainResult:
    return TrainResult(num_steps, num_steps - len(counted), 0.0, {}, 9, {}, {}, [list(range(8))] * num_steps, counted)


def moved(train: TrainConfig, steps: list[int], impulse: int, decay: float) -> float:
    """Where plain steps of the learning rate's size leave a parameter that began at 0, if only one step has a way."""
    parameter = 0.0
    for step in steps:
        rate = train.learning_rate * warmup_cosine((step + 0.5) / train.total_steps, warmup=train.warmup)
        parameter *= 1.0 - rate * decay
        parameter += rate * (step == impulse)
        parameter *= 1.0 - rate * train.proximal_mu
    return abs(parameter)


@given(
    st.floats(0.0, 30.0),
    st.floats(0.0, 10.0),
    st.floats(0.0, 1.0),
    st.lists(st.integers(0, 39), min_size=1, unique=True),
)
def test_weights_are_what_a_step_leaves_behind(mu, decay, warmup, steps):
    train = TrainConfig(rounds=4, local_steps=10, learning_rate=0.1, proximal_mu=mu, weight_decay=decay, warmup=warmup)
    steps.sort()
    expected = [moved(train, steps, step, decay) for step in reversed(steps)]
    np.testing.assert_allclose(step_weights(train, steps, decay), expected, rtol=1e-9, atol=1e-12)


def test_a_pull_back_by_hand():
    """Rates of .1 and, at the end of the warm-up, .3: half and then no way back, of which the first step keeps none."""
    train = TrainConfig(rounds=1, local_steps=2, learning_rate=0.4, warmup=1.0, proximal_mu=1.0)
    assert step_weights(train, [0, 1], 0.0) == pytest.approx([0.3 * 0.7, 0.1 * 0.9 * 0.7])


@given(st.integers(1, 40), st.integers(5, 40), st.floats(0.0, 1.0), st.data())
def test_no_schedule_alone_is_refused(rounds, local_steps, warmup, data):
    train = TrainConfig(rounds=rounds, local_steps=local_steps, warmup=warmup)
    first = local_steps * data.draw(st.integers(0, rounds - 1))
    FLOORS.check_round(train, first, result(local_steps, range(local_steps)))


def test_steps_that_were_left_out_do_not_count():
    train = TrainConfig(rounds=9, local_steps=20)
    FLOORS.check_round(train, 0, result(20, range(5)))
    FLOORS.check_round(train, 0, result(20, ()))  # nothing has moved
    with pytest.raises(LimitError, match="4 steps counted"):
        FLOORS.check_round(train, 0, result(20, range(4)))
    Floors(1, 1).check_round(train, 0, result(20, [3]))


@pytest.mark.parametrize("extreme", [{"proximal_mu": 1000.0}, {"weight_decay": 10.0}, {"learning_rate": 10.0}])
def test_the_largest_numbers_are_refused_or_even(extreme):
    train = TrainConfig(rounds=2, local_steps=6, **extreme)
    weights = step_weights(train, range(6), train.weight_decay)
    if not 3 * sum(weights) >= 5 * max(weights):
        with pytest.raises(LimitError, match="one step makes most"):
            FLOORS.check_round(train, 0, result(6, range(6)))


def test_streams_of_few_subjects(make_run, make_store):
    store = make_store(make_run(), 30, complete=True)
    everybody = [store.indices("train")]
    assert Floors(30, 1).streams_below(store, everybody) == set()
    assert Floors(31, 1).streams_below(store, everybody) == set(store.images)
    assert FLOORS.streams_below(store, [[1, 2, 3, 4], [4, 3, 2, 1]]) == set(store.images)
    assert FLOORS.streams_below(store, [[1, 2, 3, 4], [5, 6, 7, 8]]) == set()
    assert Floors(1, 1).streams_below(store, []) == set()


def test_a_step_of_too_few_subjects_with_a_loss_is_refused_if_it_counted():
    train = TrainConfig(rounds=9, local_steps=6)
    few = replace(result(6, range(6)), batches=[list(range(8))] * 5 + [list(range(7))])
    with pytest.raises(LimitError, match="7 subjects of a step have anything to guess"):
        FLOORS.check_round(train, 0, few)
    FLOORS.check_round(train, 0, replace(few, counted=range(5)))
    Floors(1, 1).check_round(train, 0, replace(few, batches=[[]] * 6))


@pytest.mark.parametrize(
    ("subjects", "expected"),
    [([8, 9, 8, 8], [4, 3, 2, 1]), ([8, 7, 8, 0], [20 / 3, 0, 10 / 3, 0]), ([1, 2, 0, 3], [2.5, 2.5, 2.5, 2.5])],
)
def test_gate_mass_of_experts_with_few_subjects_goes_to_the_others(subjects, expected):
    of_round = replace(result(5, range(5)), gate_mass={"a": [4, 3, 2, 1]}, contributors_per_expert={"a": subjects})
    assert FLOORS.gate_mass(of_round)["a"] == pytest.approx(expected)
    assert Floors(1, 1).gate_mass(of_round) == of_round.gate_mass


def test_numbers_of_experts_with_few_subjects_are_withheld_with_the_director_that_they_moved():
    manifest = manifest_of(
        {
            name.split(".")[0]: {f"backbone.blocks.{i}.mlp.{name}": shape for i in (0, 1)}
            for name, shape in EXPERT_SHAPES.items()
        }
    )
    first, second = "backbone.blocks.0.mlp", "backbone.blocks.1.mlp"
    mass, counts = {first: [5.0, 5.0], second: [10.0, 0.0]}, {first: [8, 7], second: [8, 0]}
    of_round = replace(result(5, range(5)), gate_mass=mass, contributors_per_expert=counts)
    masks = FLOORS.withheld(manifest, of_round)
    assert masks["experts"].tolist() == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3
    assert masks["router"].tolist() == [False, False, True, True] * 2
    assert masks["director"].tolist() == [True] * 3 + [False] * 3
    assert Floors(1, 1).withheld(manifest, of_round) == {}


EXPERT_SHAPES = {"director.0.bias": (3,), "experts.bias_in": (2, 3), "router.weight": (2, 2)}


def test_a_private_run_takes_part_where_the_site_bounds_epsilon_itself_or_has_no_floors(make_run):
    private = """
[objective]
standardise = false
[masking]
policy = "random"
[patient-dp]
epsilon = 8.0
delta = 1e-3
public-subjects = 100
noise-multiplier = 1.0
sample-rate = 0.5
"""
    run = make_run(private)
    check_floors(run.train, run.patient_dp, LimitsConfig(epsilon=1.0, delta=1e-3, public_subjects=100))
    check_floors(run.train, run.patient_dp, LimitsConfig(smallest_batch=1, smallest_steps=1))
    for one_floor in ({"smallest_batch": 1}, {"smallest_steps": 1}, {"delta": 1e-3, "public_subjects": 100}):
        with pytest.raises(LimitError, match=r"expected limits\.epsilon, delta and public-subjects"):
            check_floors(run.train, run.patient_dp, LimitsConfig(**one_floor))
