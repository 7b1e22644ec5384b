import tracemalloc
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panfm.errors import ProtocolError
from strategies import exact_mean as module
from strategies.exact_mean import ExactMean


def exact(updates: list[np.ndarray], weights: list[float]) -> list[Fraction]:
    """The obvious, in rational numbers."""
    total = sum(Fraction(weight) for weight in weights)
    return [
        sum(Fraction(weight) * Fraction(float(update[index])) for update, weight in zip(updates, weights, strict=True))
        / total
        for index in range(len(updates[0]))
    ]


def allowed(updates: list[np.ndarray], weights: list[float], *, usual: float = 0.25) -> np.ndarray:
    """The error that the module's docstring allows, where the weights sum to the limit."""
    total, sizes = sum(weights), np.abs(np.asarray(updates, np.float64))
    unit = 2.0 ** (np.ceil(np.log2(total)) + np.ceil(np.log2(usual)) - 30)
    wanted = np.average(np.asarray(updates, np.float64), axis=0, weights=weights)
    rounded = np.average(sizes, axis=0, weights=weights) + np.abs(wanted)
    return len(updates) * unit / 2 / total + 2.0**-23 * rounded + 2.0**-149


def mean_of(updates: list[np.ndarray], weights: list[float], limit: float | None = None) -> np.ndarray:
    mean = ExactMean(((len(updates[0]), 0),), weight_limit=limit or sum(weights))
    for update, weight in zip(updates, weights, strict=True):
        mean.add(update, (weight,))
    result = mean.mean()
    assert result is not None
    return result


def test_by_hand():
    updates = [np.array([1, -2], np.float32), np.array([4, 0.5], np.float32)]
    assert mean_of(updates, [1, 2]).tolist() == [3.0, np.float32(-1 / 3)]


contributions = st.integers(1, 5).flatmap(
    lambda size: st.lists(
        st.tuples(
            st.lists(st.floats(-64, 64, width=32), min_size=size, max_size=size),
            st.integers(1, 10**6),
        ),
        min_size=1,
        max_size=6,
    )
)


@settings(max_examples=60, deadline=None)
@given(contributions)
def test_bound(entries):
    updates = [np.array(values, np.float32) for values, _ in entries]
    weights = [float(weight) for _, weight in entries]
    pairs = zip(mean_of(updates, weights), exact(updates, weights), allowed(updates, weights), strict=True)
    for found, wanted, most in pairs:
        assert abs(Fraction(float(found)) - wanted) <= Fraction(float(most))


@settings(max_examples=30, deadline=None)
@given(contributions, st.randoms(use_true_random=False))
def test_order(entries, random):
    def run(some: list) -> bytes:
        return mean_of([np.array(values, np.float32) for values, _ in some], [float(w) for _, w in some], 1e7).tobytes()

    shuffled = list(entries)
    random.shuffle(shuffled)
    assert run(shuffled) == run(entries)


def test_order_where_floats_fail():
    """A float32 sum of these depends on the order; ours must not, and the negative control must."""
    generator = np.random.default_rng(0)
    updates = [generator.normal(size=100).astype(np.float32) * 10.0**-index for index in range(5)]
    ours, naive = set(), set()
    for order in permutations(range(5)):
        ours.add(mean_of([updates[index] for index in order], [float(index + 1) for index in order]).tobytes())
        total = np.zeros(100, np.float32)
        for index in order:
            total += np.float32(index + 1) * updates[index]
        naive.add(total.tobytes())
    assert len(ours) == 1
    assert len(naive) > 1


@pytest.mark.parametrize("size", [7, 50, 700])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0])
def test_nearly_as_good_as_float64(size, scale, monkeypatch):
    """Five sites, over several rows, of which the most are shared by two threads."""
    monkeypatch.setattr(module, "_ROW", 20)
    monkeypatch.setattr(module, "_ROWS_FOR_TWO", 10)
    generator = np.random.default_rng(1)
    updates = [generator.normal(scale=scale, size=size).astype(np.float32) for _ in range(5)]
    weights = [2700.0, 1800.0, 2680.0, 1.0, 900.5]
    wanted = np.average(np.asarray(updates, np.float64), axis=0, weights=weights)
    error = np.abs(mean_of(updates, weights) - wanted)
    assert (error <= allowed(updates, weights)).all()
    assert error.max() > 0.0


def test_smaller_usual_numbers_have_finer_units():
    updates = [np.random.default_rng(seed).normal(scale=1e-4, size=1000).astype(np.float32) for seed in range(3)]
    wanted = np.mean(np.asarray(updates, np.float64), axis=0)
    errors = []
    for usual in (64.0, 0.25, 2.0**-8):
        mean = ExactMean(((1000, 0),), weight_limit=3, usual=usual)
        for update in updates:
            mean.add(update, (1.0,))
        errors.append(np.abs(mean.mean() - wanted).max())
        assert errors[-1] <= allowed(updates, [1.0] * 3, usual=usual).max()
    assert errors[0] > 10 * errors[1]
    assert errors[1] > errors[2]


def test_numbers_beyond_the_usual_are_as_exact_wherever_they_come(monkeypatch):
    """In some rows of some updates; beside them the bits are those of a mean that never met one."""
    monkeypatch.setattr(module, "_ROW", 5)
    updates = [np.random.default_rng(seed).normal(scale=0.01, size=23).astype(np.float32) for seed in range(4)]
    quiet = mean_of(updates, [1.0, 2.0, 3.0, 4.0])
    updates[1][7], updates[3][7], updates[3][22] = 60.0, -63.0, 1.5
    found = {
        mean_of([updates[index] for index in order], [index + 1.0 for index in order]).tobytes()
        for order in permutations(range(4))
    }
    assert len(found) == 1
    mean = np.frombuffer(found.pop(), np.float32)
    rest = np.delete(np.arange(23), [7, 22])
    assert mean[rest].tobytes() == quiet[rest].tobytes()
    assert (np.abs(mean - np.average(np.asarray(updates, float), axis=0, weights=[1, 2, 3, 4])) < 1e-5).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_usual_numbers_beside_ones_beyond_them(sign):
    """Every partial sum is there in some order: none overflows, whichever part of a number holds it."""
    entries = [(0.25, 1.5), (0.25, 1.5), (64.0, 0.25), (-64.0, 0.25), (-0.25, 0.25), (0.375, 0.25)]
    entries = [(np.array([sign * value, sign * 0.25], np.float32), weight) for value, weight in entries]
    found = {mean_of(*zip(*order, strict=True)).tobytes() for order in permutations(entries)}
    assert [np.frombuffer(each, np.float32).tolist() for each in found] == [[sign * 0.1953125, sign * 0.25]]


def test_one_site_gives_its_update_back():
    update = np.random.default_rng(2).normal(size=1000).astype(np.float32)
    assert (np.abs(mean_of([update], [3000.0]) - update) <= allowed([update], [3000.0])).all()


@pytest.mark.parametrize("many", [1, 2, 3, 1000])
def test_the_largest_usual_numbers_fill_the_sum_and_no_more(many):
    update = np.array([0.25, -0.25, 2**-20, 0], np.float32)
    assert mean_of([update] * many, [1.0] * many, limit=float(many)).tolist() == update.tolist()


def test_the_mean_takes_the_place_of_the_sum():
    mean = ExactMean(((2, 0),), weight_limit=2)
    mean.add(np.array([0.125, 4.0], np.float32), (2.0,))
    assert mean.mean().tolist() == [0.125, 4.0]
    assert mean.mean() is None


def test_nobody_and_weight_zero_are_no_mean():
    mean = ExactMean(((3, 0),), weight_limit=10)
    assert mean.mean() is None
    mean.add(np.ones(3, np.float32), (0.0,))
    assert mean.mean() is None


def test_extremes_do_not_overflow():
    update = np.full(4, 64, np.float32)
    assert mean_of([update, update, update], [2.0**20] * 3).tolist() == [64] * 4
    assert mean_of([-update] * 3, [3.0, 5.0, 7.5]).tolist() == [-64] * 4


@pytest.mark.parametrize("weights", [(2**24 + 3.0, 2**24 + 1.0, 2**24 + 3.0), (6.006, 4.004, 2.002)])
def test_weights_at_their_limit_may_round_up(weights):
    """Whoever comes last is not refused for it, nor one that weighs nothing."""
    entries = [(np.full(1, weight / 2**25, np.float32), weight) for weight in (*weights, 0.0)]
    found = {mean_of(*zip(*order, strict=True), limit=sum(weights)).tobytes() for order in permutations(entries)}
    assert len(found) == 1


@pytest.mark.parametrize("usual", [1e-6, 1e-9, 1e-30])
def test_the_largest_numbers_do_not_overflow_however_small_the_usual(usual):
    mean = ExactMean(((3, 0),), weight_limit=3, usual=usual)
    for _ in range(3):
        mean.add(np.array([64, -64, 1e-5], np.float32), (1.0,))
    np.testing.assert_allclose(mean.mean(), [64, -64, 1e-5], rtol=1e-6)


def test_large_numbers_that_are_taken_off_leave_nothing_behind():
    mean, update = ExactMean(((9, 0),), weight_limit=1), np.full(9, 64, np.float32)
    mean.add(update, (1.0,))
    assert mean._overflow_rows
    mean.remove(update, (1.0,))
    assert not mean._overflow_rows


def test_empty_group():
    assert mean_of([np.zeros(0, np.float32)], [1.0]).size == 0


@pytest.mark.parametrize(
    ("update", "weight", "why"),
    [
        ([1, np.nan], 1, "NaN"),
        ([np.inf, 0], 1, "NaN"),
        ([65, 0], 1, "beyond 64"),
        ([0, -65], 1, "beyond 64"),
        ([1], 1, r"expected float32 \[2\]"),
        ([1, 1], -1, "weight -1"),
        ([1, 1], float("nan"), "weight nan"),
        ([1, 1], 9, "at most 10"),
    ],
)
def test_all_or_nothing(update, weight, why):
    mean = ExactMean(((2, 0),), weight_limit=10)
    mean.add(np.array([1, 2], np.float32), (2.0,))
    with pytest.raises(ProtocolError, match=why):
        mean.add(np.array(update, np.float32), (weight,))
    assert mean.mean().tolist() == [1, 2]


def test_other_dtypes_are_refused():
    with pytest.raises(ProtocolError, match="float64"):
        ExactMean(((2, 0),), weight_limit=1).add(np.zeros(2), (1.0,))


def test_a_limit_must_be_a_limit():
    with pytest.raises(ValueError, match="limit 0"):
        ExactMean(((2, 0),), weight_limit=0)


def by_expert(segments, entries, limit=1e7):
    mean = ExactMean(segments, weight_limit=limit)
    for update, weights in entries:
        mean.add(update, weights)
    return mean


def test_a_weight_per_expert_by_hand():
    """Two experts, two tensors: numbers 0, 1 and 4 are the first's, 2, 3 and 5 the second's."""
    segments = ((2, 0), (2, 1), (1, 0), (1, 1))
    ones, threes = np.ones(6, np.float32), np.full(6, 3, np.float32)
    mean = by_expert(segments, [(ones, (1.0, 0.0)), (threes, (3.0, 5.0))])
    assert mean.total_weights == (4.0, 5.0)
    assert mean.mean().tolist() == [2.5, 2.5, 3.0, 3.0, 2.5, 3.0]


def test_an_expert_that_nobody_used_keeps_its_bytes():
    """Also the sign of a zero; the negative control is what a mean of 0.0 would do to it."""
    before = np.array([-0.0, 0.0, 1.5, -0.0], np.float32)
    mean = by_expert(((2, 0), (2, 1)), [(np.full(4, 9, np.float32), (0.0, 1.0))]).mean()
    assert (before + mean)[:2].tobytes() == before[:2].tobytes()
    assert (before + np.zeros(4, np.float32))[:2].tobytes() != before[:2].tobytes()
    assert (before + mean)[2:].tolist() == [10.5, 9.0]


experts = st.integers(1, 4).flatmap(
    lambda num: st.tuples(
        st.lists(st.tuples(st.integers(0, 5), st.integers(0, num - 1)), min_size=1, max_size=6).map(
            lambda segments: (*segments, *((1, which) for which in range(num)))
        ),
        st.lists(
            st.tuples(st.integers(0, 2**32), st.lists(st.floats(0, 1000), min_size=num, max_size=num)),
            min_size=1,
            max_size=5,
        ),
    )
)


@settings(max_examples=60)
@given(experts, st.randoms(use_true_random=False))
def test_each_expert_is_averaged_as_if_alone(case, random):
    """A segmented mean has the bits of one mean per expert, in any order."""
    segments, sites = case
    size = sum(length for length, _ in segments)
    owner = np.concatenate([np.full(length, which) for length, which in segments])
    entries = [(np.random.default_rng(seed).normal(size=size).astype(np.float32), weights) for seed, weights in sites]
    shuffled = list(entries)
    random.shuffle(shuffled)
    found = by_expert(segments, shuffled).mean()
    for which in set(owner.tolist()):
        alone = ExactMean(((int((owner == which).sum()), 0),), weight_limit=1e7)
        for update, weights in entries:
            alone.add(update[owner == which], (weights[which],))
        wanted = alone.mean()
        if found is not None and wanted is None:
            assert np.signbit(found[owner == which]).all()
            assert not found[owner == which].any()
        elif found is not None:
            assert found[owner == which].tobytes() == wanted.tobytes()
        else:
            assert wanted is None


def test_every_weight_is_checked_and_none_is_added_alone():
    mean = by_expert(((1, 0), (1, 1)), [(np.ones(2, np.float32), (4.0, 6.0))], limit=10)
    for weights, why in (((1.0, 5.0), "weight 5"), ((1.0, -1.0), "weight -1"), ((1.0,), "1 weights, expected 2")):
        with pytest.raises(ProtocolError, match=why):
            mean.add(np.ones(2, np.float32), weights)
    assert mean.total_weights == (4.0, 6.0)


@pytest.mark.parametrize("size", [0, 1, 7, 1 << 12, (1 << 15) + 3, (1 << 20) + 5])
def test_the_norm(size):
    update = np.random.default_rng(0).normal(size=size).astype(np.float32)
    found = ExactMean(((size, 0),), weight_limit=1).add(update, (0.0,))
    assert found == pytest.approx(np.linalg.norm(update.astype(float)), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(contributions, st.randoms(use_true_random=False))
def test_what_is_taken_off_never_came(entries, random):
    """To the bit, whatever the order, with numbers beyond the usual and without."""
    size, others = len(entries[0][0]), [([random.uniform(-9, 9)] * len(entries[0][0]), 7.5) for _ in range(3)]
    mean = ExactMean(((size, 0),), weight_limit=1e7)
    steps = [(mean.add, entry) for entry in entries] + [(mean.add, entry) for entry in others]
    random.shuffle(steps)
    for step, (values, weight) in steps + [(mean.remove, entry) for entry in others]:
        step(np.array(values, np.float32), (float(weight),))
    alone = mean_of([np.array(values, np.float32) for values, _ in entries], [float(w) for _, w in entries], 1e7)
    assert mean.mean().tobytes() == alone.tobytes()


@pytest.mark.parametrize("segments", [((9, 0),), ((2, 0), (0, 1), (3, 1), (4, 0))])
def test_a_given_space_is_worked_in_and_what_it_held_does_not_matter(segments):
    space = np.full(9, np.nan, np.float32)
    mean = ExactMean(segments, weight_limit=10, space=space)
    update = np.arange(9, dtype=np.float32) / 64
    update.flags.writeable = False
    mean.add(update, (2.0, 1.0)[: 1 + max(which for _, which in segments)])
    assert mean.mean() is space
    assert space.tolist() == update.tolist()


def test_a_tie_is_rounded_by_the_contribution_alone():
    """Half-way numbers, with sums that are odd and even when they come: both ways round, the same bits."""
    half = 2.0 ** -(30 - 2 + 2) / 2  # weight limit 4, usual 1/4
    updates = [np.array([count * half], np.float32) for count in (1, 3, 5, 7)]
    found = {mean_of([updates[index] for index in order], [1.0] * 4, 4.0).tobytes() for order in permutations(range(4))}
    assert len(found) == 1


def test_two_threads_and_one_give_the_same_bits(monkeypatch):
    updates = [np.random.default_rng(seed).normal(size=100_001).astype(np.float32) for seed in range(3)]
    alone = mean_of(updates, [1.0, 2.0, 3.0])
    monkeypatch.setattr(module, "_ROWS_FOR_TWO", 2)
    assert mean_of(updates, [1.0, 2.0, 3.0]).tobytes() == alone.tobytes()


def test_at_worst_numbers_beyond_the_usual_take_eight_bytes_each():
    """The sum, and what it cannot hold; the mean makes no second copy of either."""
    size = 1 << 20
    update = np.full(size, 8.0, np.float32)
    tracemalloc.start()
    mean = ExactMean(((size, 0),), weight_limit=4.0)
    for _ in range(2):
        mean.add(update, (1.0,))
    found = mean.mean()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found == 8.0).all()
    assert 8 * size <= peak < 8.5 * size
