"""Norm bounds: absolute, against what was usual at other sites, and the length to which updates are shortened."""

import math

import pytest

from panfm.config import RunConfig
from panfm.errors import ProtocolError
from strategies.reply_guards import NormBounds, learning_rates
from strategies.server_step import Norms, add_norms


def bounds_of(run: RunConfig, number: int, past: Norms) -> NormBounds:
    return NormBounds(run.sharing, run.train, number, past)


@pytest.fixture
def run(make_run):
    """Ten rounds of four steps at a constant rate of nearly 0.003."""
    run = make_run()
    return run.model_copy(
        update={"train": run.train.model_copy(update={"rounds": 1000, "local_steps": 4, "warmup": 0.0})}
    )


def past(*rounds: dict[str, float], group: str = "backbone"):
    norms = {}
    for number, sites in enumerate(rounds, start=1):
        norms = add_norms(norms, number, {site: {group: norm} for site, norm in sites.items()})
    return norms


def test_the_absolute_bound_by_hand(run):
    """Learning rate 0.003, 4 local steps, limit 1.5: root mean square 0.018; 4 numbers: norm 0.036."""
    bounds = bounds_of(run, 1, {})
    bounds.check_norm("a", "backbone", 0.0359, 4)
    for norm in (0.0361, math.inf, math.nan):
        with pytest.raises(
            ProtocolError, match=r"^backbone: norm .*, expected at most 0.036 \(sharing.guards.norm-limit"
        ):
            bounds.check_norm("a", "backbone", norm, 4)


def test_the_absolute_bound_follows_the_schedule(make_run):
    run = make_run()
    rounds = run.train.rounds
    assert sum(learning_rates(run.train, number) for number in range(1, rounds + 1)) < 0.003 * run.train.total_steps
    first, last = (bounds_of(run, number, {}).limit("a", "head", 4)[0] for number in (1, rounds))
    assert 0 < last < first or rounds < 3


def test_the_absolute_bound_of_directors_does_not_shrink_with_the_rates(make_run):
    """They follow experts that moved at the rates of earlier rounds: 1.5 * 0.003 * steps * sqrt(4) in each."""
    run = make_run()
    run = run.model_copy(update={"train": run.train.model_copy(update={"rounds": 15, "warmup": 0.0})})
    expected = 1.5 * 0.003 * run.train.local_steps * 2.0
    for number in (1, 8, 15):
        assert bounds_of(run, number, {}).limit("a", "director", 4) == (pytest.approx(expected), "norm-limit")
    assert bounds_of(run, 15, {}).limit("a", "experts", 4)[0] < 0.1 * expected


def test_a_group_may_have_a_bound_of_its_own(make_run, run):
    own = make_run("[sharing.groups.stream]\nnorm-limit = 0.1\n[sharing.groups.'stream:brain-mr']\nnorm-limit = 0.2\n")
    bounds = NormBounds(own.sharing, run.train, 1, {})
    bounds.check_norm("a", "head", 0.035, 4)
    bounds.check_norm("a", "stream:brain-mr", 0.0047, 4)
    for group, norm in (("stream:brain-mr", 0.0049), ("stream:heart-ct", 0.0025)):
        with pytest.raises(ProtocolError, match="norm-limit"):
            bounds.check_norm("a", group, norm, 4)


def test_the_relative_bound_by_hand(run):
    """Medians of the others of a are 0.002 and 0.004, usual is 0.003; at most three times as much."""
    bounds = bounds_of(run, 3, past({"a": 9.0, "b": 0.001, "c": 0.003}, {"a": 9.0, "b": 0.003, "c": 0.005}))
    bounds.check_norm("a", "backbone", 0.0089, 400)
    with pytest.raises(ProtocolError, match=r"norm 0.0091, expected at most 0.009 \(sharing.guards.norm-ratio\)"):
        bounds.check_norm("a", "backbone", 0.0091, 400)
    assert bounds.clip("a", "backbone") == pytest.approx(0.003, rel=1e-3)
    assert bounds.limit("a", "head", 400)[1] == "norm-limit"
    assert bounds.clip("a", "head") == math.inf


@pytest.mark.parametrize(
    "rounds", [[{"b": 0.001, "c": 0.001}], [{"b": 0.001}] * 9], ids=["one round", "one other site"]
)
def test_with_little_history_the_bound_is_ten_times_as_wide(run, rounds):
    limit, key = bounds_of(run, len(rounds) + 1, past(*rounds)).limit("a", "backbone", 10**6)
    assert (limit, key) == (pytest.approx(0.03, rel=1e-3), "norm-ratio")


def test_sites_that_left_a_group_as_it_was_do_not_count(run):
    """By the plain mean, sites without an organ send its group unchanged: sites that have it are judged among them."""
    having = [{"a": 0.03, "b": norm} for norm in (0.002, 0.004)]
    alone = bounds_of(run, 3, past(*having))
    among = bounds_of(run, 3, past(*({**sites, "c": 0.0, "d": 0.0, "e": 0.0} for sites in having)))
    assert among.limit("a", "backbone", 400) == alone.limit("a", "backbone", 400)
    assert among.clip("a", "backbone") == alone.clip("a", "backbone") == math.inf
    assert among.limit("c", "backbone", 400)[0] == pytest.approx(3 * (0.016 + 0.017) / 2, rel=1e-3)


def test_a_site_alone_is_bound_by_what_training_can_reach(run):
    assert bounds_of(run, 4, past({"a": 0.01}, {"a": 0.01}, {"a": 0.01})).limit("a", "backbone", 4)[1] == "norm-limit"


def test_growing_rates_widen_the_relative_bound_and_falling_ones_do_not_narrow_it(make_run):
    train = make_run().train.model_copy(update={"rounds": 20, "local_steps": 2, "warmup": 0.5})
    run = make_run().model_copy(update={"train": train})
    before = past(*[{"b": 1e-3, "c": 1e-3}] * 2)
    grown = learning_rates(train, 6) / learning_rates(train, 2)
    assert bounds_of(run, 6, before).limit("a", "backbone", 10**8)[0] > 3e-3 * grown
    late = past(*[{}] * 17, {"b": 1e-3, "c": 1e-3}, {"b": 1e-3, "c": 1e-3})
    assert bounds_of(run, 20, late).limit("a", "backbone", 10**8)[0] == pytest.approx(3e-3)
    assert bounds_of(run, 20, late).clip("a", "backbone") < 1e-3


def test_the_director_knows_no_rate(make_run):
    train = make_run().train.model_copy(update={"rounds": 20, "local_steps": 2, "warmup": 0.5})
    run = make_run().model_copy(update={"train": train})
    late = past(*[{}] * 17, {"b": 1e-3, "c": 1e-3}, {"b": 1e-3, "c": 1e-3}, group="director")
    assert bounds_of(run, 20, late).clip("a", "director") == pytest.approx(1e-3)


def test_memory_of_ten_rounds():
    norms = past({"gone": 7.0}, group="head")
    for number in range(12):
        norms = add_norms(norms, number, {"a": {"backbone": number + 0.5}, "b": {"backbone": 100.0}})
    assert norms["head"] == {"gone": ((1, 7.0),)}
    assert norms["backbone"]["a"] == tuple((number, number + 0.5) for number in range(2, 12))
    assert add_norms(norms, 12, {}) == norms
    late = add_norms(norms, 30, {"c": {"backbone": 1.0}})
    assert late["backbone"]["a"][0][0] == 3
