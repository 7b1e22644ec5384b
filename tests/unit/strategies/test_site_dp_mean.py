"""Site-level privacy at the server: what one site can change, and what is left of what it said."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from panfm.config.site_dp import SiteDpConfig
from panfm.errors import BudgetError
from panfm.sharing.messages import Handshake, RoundReply
from strategies import SiteDpMean, site_dp_mean
from tests.conftest import manifest_of

MANIFEST = manifest_of(
    {
        "backbone": {"backbone.a": (20,)},
        "head": {"heads.b": (5,)},
        "stream:brain-mr": {"streams.brain-mr.c": (9,)},
        "stream:eye-oct": {"streams.eye-oct.d": (7,)},
    }
)
HASHES = MANIFEST.hashes()
HOLDINGS = {
    11: ("a", ["brain-mr"]),
    12: ("b", ["eye-oct"]),
    13: ("c", ["brain-mr", "eye-oct"]),
    14: ("d", ["brain-mr"]),
}
TRAIN = {"backbone": 4, "head": 4, "stream:brain-mr": 3, "stream:eye-oct": 2}
CLIP = 0.5


def shaken(site, streams):
    groups = ["backbone", "head", *(f"stream:{stream}" for stream in streams)]
    return Handshake(site, 0, dict.fromkeys(streams, 0), {}, "", {group: HASHES[group] for group in groups})


ROSTER = {node_id: shaken(*held) for node_id, held in HOLDINGS.items()}


def reply(node_id, *, seed=0, size=1.0, **changes):
    """Random updates; the site also says what it should not."""
    random = np.random.default_rng(seed + node_id)
    groups = ROSTER[node_id].group_hashes
    updates = {group: (size * random.normal(size=MANIFEST.size(group))).astype(np.float32) for group in groups}
    weights = dict.fromkeys(groups, (1.0,))
    said = RoundReply("run-1", 5, 4, updates, weights, 0.7, 0.8, 1, {"brain-mr": 1.0}, {"experts-used": 2.0})
    return replace(said, **changes)


def message(node_id, answer):
    records = answer.to_records()
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(array) for name, array in records.arrays.items()}),
            "metrics": MetricRecord(dict(records.metrics)),
            "config": ConfigRecord(dict(records.config)),
        }
    )
    asked = Message(RecordDict(), node_id, "train")
    asked.metadata.__dict__["_message_id"] = f"ask-{node_id}"
    return Message(content, reply_to=asked)


@pytest.fixture
def build(make_run):
    """A strategy that has asked four sites for round 5."""

    def make(pay=lambda number: None, noise=5.0):
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        table = SiteDpConfig(epsilon=8.0, delta=0.01, num_sites=4, noise_multiplier=noise, clip_norm=CLIP)
        run = make_run().model_copy(update={"site_dp": table})
        built = SiteDpMean(run, MANIFEST, ROSTER, pay=pay)
        arrays = ArrayRecord({group: Array(np.zeros(MANIFEST.size(group), np.float32)) for group in MANIFEST.groups})
        list(built.configure_train(5, arrays, ConfigRecord({"run-id": "run-1"}), None))
        return built

    return make


@pytest.fixture
def without_noise(monkeypatch):
    """What the noise is added to, and how much of it."""
    asked = []

    def noised(mean, num_sites, *, clip_norm, noise):
        asked.append((num_sites, clip_norm, noise))
        return mean

    monkeypatch.setattr(site_dp_mean, "noised_mean", noised)
    return asked


def aggregate(strategy, replies):
    arrays, _ = strategy.aggregate_train(5, [deepcopy(message(node_id, each)) for node_id, each in replies.items()])
    return {group: array.numpy().astype(np.float64) for group, array in arrays.items()}


def everyone(**more):
    return {node_id: reply(node_id, **more) for node_id in ROSTER}


def test_every_site_weighs_alike_and_noise_is_for_the_sites_that_train_a_group(build, without_noise):
    small = everyone(size=1e-3)
    new = aggregate(build(), small)
    for group, num in TRAIN.items():
        sent = [each.updates[group] for each in small.values() if group in each.updates]
        assert len(sent) == num
        np.testing.assert_allclose(new[group], np.mean(sent, axis=0), atol=1e-9)
    assert without_noise == [(TRAIN[group], CLIP, 5.0) for group in MANIFEST.groups]


def test_a_weight_that_a_site_claims_does_not_count(build, without_noise):
    replies = everyone(size=1e-3)
    lighter = replies | {11: replace(replies[11], weights=dict.fromkeys(ROSTER[11].group_hashes, (0.25,)))}
    first, second = aggregate(build(), replies), aggregate(build(), lighter)
    assert all(np.array_equal(first[group], second[group]) for group in first)


@pytest.mark.parametrize("changed", list(ROSTER))
@pytest.mark.parametrize("size", [0.01, 1.0, 1e3])
def test_zeroing_a_site_out_moves_the_sums_by_at_most_the_clip_norm(build, without_noise, changed, size):
    """Sites hold unlike streams: jointly over all groups C, and C / n_g in the mean of each."""
    replies = everyone(size=size)
    zero = {group: np.zeros_like(update) for group, update in replies[changed].updates.items()}
    whole = aggregate(build(), replies)
    rest = aggregate(build(), replies | {changed: replace(replies[changed], updates=zero)})
    moved = {group: np.linalg.norm(whole[group] - rest[group]) for group in whole}
    assert all(moved[group] <= CLIP / TRAIN[group] * (1 + 1e-5) for group in moved)
    joint = np.sqrt(sum((TRAIN[group] * moved[group]) ** 2 for group in moved))
    assert joint <= CLIP * (1 + 1e-5)
    if size >= 1.0:  # met, so that an update clipped group by group would show
        assert joint > CLIP * (1 - 1e-5)
    untouched = set(whole) - set(replies[changed].updates)
    assert all(moved[group] == 0.0 for group in untouched)


def test_an_update_of_no_numbers_counts_as_zero_and_nobody_is_refused(build, without_noise):
    replies = everyone(size=1e-3)
    poisoned = {group: np.full_like(update, np.nan) for group, update in replies[12].updates.items()}
    huge = {group: np.full_like(update, 1e30) for group, update in replies[13].updates.items()}
    strategy = build()
    new = aggregate(
        strategy, replies | {12: replace(replies[12], updates=poisoned), 13: replace(replies[13], updates=huge)}
    )
    assert not strategy.outcome.rejected
    assert all(np.isfinite(values).all() for values in new.values())


@pytest.mark.parametrize("update", [np.ones((20, 1), np.float32), np.float32(1.0), np.full(20, "x"), np.ones(20)])
def test_what_has_no_norm_is_refused_as_any_bad_reply(build, update):
    """Updates are clipped before the guards look at them."""
    replies = everyone()
    replies[11] = replace(replies[11], updates=replies[11].updates | {"backbone": np.asarray(update)})
    strategy = build()
    assert not any(values.any() for values in aggregate(strategy, replies).values())
    assert list(strategy.outcome.rejected) == ["a"]
    assert strategy.outcome.rejected["a"].startswith("backbone: update is")


def test_nothing_that_a_site_says_of_itself_is_kept(build):
    strategy = build()
    aggregate(strategy, everyone())
    for kept in strategy.outcome.accepted.values():
        assert (kept.loss, kept.validation_loss, kept.num_skipped, kept.saliency) == (None, None, None, {})
        assert kept.monitors == {}
        assert set(kept.weights.values()) == {(1.0,)}
    assert set(map(len, strategy.outcome.norms.values())) == {0}
    assert not any(strategy.memory.norms.values())


@pytest.mark.parametrize("missing", ["absent", "refused"])
def test_a_round_without_all_sites_releases_nothing_and_costs_nothing(build, missing):
    paid = []
    strategy = build(paid.append)
    replies = everyone()
    if missing == "absent":
        del replies[14]
    else:
        replies[14] = replace(replies[14], round_number=3)
    assert not any(values.any() for values in aggregate(strategy, replies).values())
    assert paid == []


def test_it_pays_before_noise_is_drawn_and_a_refusal_ends_the_round(build, monkeypatch):
    order = []
    monkeypatch.setattr(site_dp_mean, "noised_mean", lambda mean, *_, **__: order.append("noise") or mean)
    aggregate(build(order.append), everyone())
    assert order == [5, *["noise"] * 4]

    def refuse(number):
        raise BudgetError("exhausted")

    with pytest.raises(BudgetError):
        aggregate(build(refuse), everyone())
    assert len(order) == 5


def test_whoever_comes_later_is_not_asked(build):
    strategy = build()
    strategy.roster = ROSTER | {15: shaken("late", ["brain-mr"])}
    arrays = ArrayRecord({group: Array(np.zeros(MANIFEST.size(group), np.float32)) for group in MANIFEST.groups})
    asked = list(strategy.configure_train(6, arrays, ConfigRecord({"run-id": "run-1"}), None))
    assert [each.metadata.dst_node_id for each in asked] == [11, 12, 13, 14]


def test_the_noise_of_all_groups_is_the_stated_one(build):
    """Rounds of zero updates: n_g times a group's change has a standard deviation of z C."""
    strategy = build(noise=3.0)
    zero = {
        node_id: replace(each, updates={group: np.zeros_like(update) for group, update in each.updates.items()})
        for node_id, each in everyone().items()
    }
    rounds = [aggregate(strategy, zero) for _ in range(60)]
    for group, num in TRAIN.items():
        found = np.std([num * new[group] for new in rounds])
        assert found == pytest.approx(3.0 * CLIP, rel=5 / np.sqrt(2 * 60 * MANIFEST.size(group)))
