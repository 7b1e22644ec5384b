"""The grouped mean over replies as they come from sites, by hand."""

import gc
import weakref
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from panfm.config import RunConfig
from panfm.sharing.coding import encode
from panfm.sharing.messages import Handshake, RoundReply
from panfm.sharing.npy import NpySpace, view_npy
from strategies import GroupedMean, Memory
from strategies import grouped as module
from tests.conftest import manifest_of

MANIFEST = manifest_of(
    {
        "backbone": {"backbone.a": (2,)},
        "head": {"heads.b": (1,)},
        "stream:brain-mr": {"streams.brain-mr.c": (2,)},
        "stream:eye-oct": {"streams.eye-oct.d": (1,)},
    }
)
GLOBAL = {
    "backbone": [1.0, 2.0],
    "head": [0.5],
    "stream:brain-mr": [3.0, -3.0],
    "stream:eye-oct": [0.1],
}
BOTH = {"backbone", "head"}
HASHES = MANIFEST.hashes()


def shaken(site: str, subjects: int, **streams: int) -> Handshake:
    held = {name.replace("_", "-"): count for name, count in streams.items()}
    groups = sorted(BOTH | {f"stream:{stream}" for stream in held})
    return Handshake(site, subjects, held, {}, "", {group: HASHES[group] for group in groups})


ROSTER = {11: shaken("a", 10, brain_mr=4), 12: shaken("b", 30), 13: shaken("c", 20, brain_mr=12)}


def reply(node_id: int, value: float, **changes) -> RoundReply:
    """Every number of every group moves by `value`; weights as declared, two local steps."""
    handshake = ROSTER[node_id]
    updates = {group: np.full(MANIFEST.size(group), value, np.float32) for group in handshake.group_hashes}
    weights = {group: (float(handshake.subjects * 2),) for group in BOTH}
    weights |= {f"stream:{stream}": (float(count),) for stream, count in handshake.streams.items()}
    return replace(RoundReply("run-1", 5, 4, updates, weights, loss=value), **changes)


def message(node_id: int, answer: RoundReply) -> Message:
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
def strategy(make_run) -> GroupedMean:
    return build(make_run())


def build(run: RunConfig, memory: Memory | None = None, roster: dict | None = None) -> GroupedMean:
    """A strategy that has asked for round 5."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    train = run.train.model_copy(update={"rounds": 10, "local_steps": 2, "learning_rate": 0.1})
    guards = run.sharing.guards.model_copy(update={"norm_limit": 10.0})
    sharing = run.sharing.model_copy(update={"guards": guards})
    run = run.model_copy(update={"train": train, "sharing": sharing})
    built = GroupedMean(run, MANIFEST, roster or ROSTER, memory)
    arrays = ArrayRecord({group: Array(np.array(values, np.float32)) for group, values in GLOBAL.items()})
    built.messages = list(built.configure_train(5, arrays, ConfigRecord({"run-id": "run-1"}), None))
    return built


def aggregate(strategy: GroupedMean, *replies: Message, memory: Memory | None = None) -> dict[str, np.ndarray]:
    """Of copies: the strategy takes the arrays out of what it is given. Without a memory, rounds know of no other."""
    strategy.memory = memory or Memory()
    arrays, _ = strategy.aggregate_train(5, map(deepcopy, replies))
    return {group: array.numpy() for group, array in arrays.items()}


def test_each_site_is_asked_for_its_own_groups(strategy):
    assert [asked.metadata.dst_node_id for asked in strategy.messages] == [11, 12, 13]
    assert {asked.metadata.group_id for asked in strategy.messages} == {"5"}
    assert list(strategy.messages[0].content.array_records["arrays"]) == ["backbone", "head", "stream:brain-mr"]
    assert list(strategy.messages[1].content.array_records["arrays"]) == ["backbone", "head"]
    first, second = (asked.content.array_records["arrays"]["backbone"] for asked in strategy.messages[:2])
    assert first.data is second.data


def test_by_hand(strategy):
    new = aggregate(strategy, message(11, reply(11, 0.1)), message(12, reply(12, 0.2)), message(13, reply(13, 0.4)))
    everyone = (20 * 0.1 + 40 * 0.2 + 40 * 0.4) / 100  # b may weigh as much as the median, 40
    np.testing.assert_allclose(new["backbone"], np.array([1, 2]) + everyone, rtol=1e-6)
    np.testing.assert_allclose(new["head"], 0.5 + everyone, rtol=1e-6)
    holders = (4 * 0.1 + 12 * 0.4) / 16
    np.testing.assert_allclose(new["stream:brain-mr"], np.array([3, -3]) + holders, rtol=1e-6)
    assert all(array.dtype == np.float32 for array in new.values())
    assert set(strategy.outcome.accepted) == {"a", "b", "c"}
    assert strategy.outcome.bytes_up == {"backbone": 24, "head": 12, "stream:brain-mr": 16}
    assert strategy.outcome.site_bytes_up == {"a": 8 + 4 + 8, "b": 8 + 4, "c": 8 + 4 + 8}
    assert strategy.site_bytes_down == {"a": 8 + 4 + 8, "b": 8 + 4, "c": 8 + 4 + 8}
    assert all(not kept.updates for kept in strategy.outcome.accepted.values())


def test_a_group_that_nobody_trained_keeps_its_bytes(strategy):
    before = strategy._global["stream:eye-oct"]
    arrays, _ = strategy.aggregate_train(5, [message(11, reply(11, 0.1))])
    assert arrays["stream:eye-oct"].data == before.data
    weightless = reply(12, 0.3, weights=dict.fromkeys(BOTH, (0.0,)))
    arrays, _ = strategy.aggregate_train(5, [message(12, weightless)])
    assert all(arrays[group].data == strategy._global[group].data for group in GLOBAL)


def test_replies_are_taken_one_by_one(strategy):
    """Streaming: the next reply is asked for only after the last was added and let go."""
    seen = []

    def replies():
        for node_id in ROSTER:
            seen.append(len(strategy.outcome.accepted))
            yield message(node_id, reply(node_id, 0.1))

    strategy.aggregate_train(5, replies())
    assert seen == [0, 1, 2]


def test_the_new_model_lies_where_the_sum_did(strategy, monkeypatch):
    """A copy of a large one costs more than the arithmetic of a round; whoever holds on to the mean makes one."""
    spaces, sent = [], []

    class Space(NpySpace):
        def __init__(self, size):
            super().__init__(size)
            spaces.append(self.numbers.ctypes.data)

        def close(self):
            data = super().close()
            sent.append(view_npy(data).ctypes.data)
            return data

    monkeypatch.setattr(module, "NpySpace", Space)
    aggregate(strategy, message(11, reply(11, 0.1)), message(12, reply(12, 0.2)))
    assert sent == spaces[:3]  # nobody trained the fourth group


@pytest.mark.parametrize("mean", ["weighted", "l-dawa", "median", "trimmed", "geometric-median"])
def test_what_a_later_guard_refuses_leaves_every_kind_of_mean_as_it_was(make_run, mean):
    """All groups are added before the norm of the last is looked at; large numbers are summed apart."""
    strategy = build(make_run(f'[sharing]\nmean = "{mean}"\n'), roster=ROSTER | {14: shaken("d", 20)})
    good = [message(12, reply(12, 0.2)), message(13, reply(13, 0.4)), message(14, reply(13, 0.3, **only_common(13)))]
    without = aggregate(strategy, *good)
    for size in (0.3, 9.0):
        long = updates(backbone=np.full(2, size, np.float32), **{"stream:brain-mr": np.full(2, 20, np.float32)})
        with_long = aggregate(strategy, good[0], message(11, reply(11, 0.1, **long)), *good[1:])
        assert "norm" in strategy.outcome.rejected["a"]
        assert all(with_long[group].tobytes() == without[group].tobytes() for group in GLOBAL)


def test_order_does_not_matter(strategy):
    answers = [message(node_id, reply(node_id, value)) for node_id, value in ((11, 0.1), (12, 1e-7), (13, -0.33))]
    forward, backward = aggregate(strategy, *answers), aggregate(strategy, *reversed(answers))
    assert all(forward[group].tobytes() == backward[group].tobytes() for group in GLOBAL)


def only_common(node_id: int) -> dict:
    """What a site without streams sends in place of this one's reply."""
    whole = reply(node_id, 0.3)
    return {field: {group: getattr(whole, field)[group] for group in BOTH} for field in ("updates", "weights")}


def updates(**changes) -> dict:
    """Site a's updates with some changed; None takes one out."""
    words = reply(11, 0.1).updates | {key.replace("_", ":"): value for key, value in changes.items()}
    return {"updates": {group: array for group, array in words.items() if array is not None}}


def weights(**changes) -> dict:
    return {"weights": reply(11, 0.1).weights | {group: (value,) for group, value in changes.items()}}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (updates(backbone=np.array([0.1, np.nan], np.float32)), "backbone: update holds NaN"),
        (updates(head=np.array([np.inf], np.float32)), "head: update holds NaN, infinity"),
        (updates(backbone=np.full(2, 1e3, np.float32)), "beyond 64"),
        (updates(backbone=np.full(2, 100.0, np.float32)), "update holds NaN, infinity or a number beyond 64"),
        (updates(backbone=np.full(2, 20.0, np.float32)), r"backbone: norm 28.3, expected at most 1.9 "),
        (updates(backbone=np.zeros(3, np.float32)), r"float32 \[3\], expected float32 \[2\]"),
        (updates(backbone=np.zeros((2, 1), np.float32)), r"float32 \[2, 1\]"),
        (updates(backbone=np.zeros(2)), "float64"),
        (updates(head=None), r"updates: missing \['head'\]"),
        (updates(experts=np.zeros(2, np.float32)), r"not expected \['experts'\]"),
        (weights(backbone=-1.0), "backbone: weight -1, expected 0 to 20"),
        (weights(backbone=1e12), r"weight 1e\+12, expected 0 to 20"),
        (weights(backbone=float("nan")), "weight/backbone is nan"),
        (weights(teacher=1.0), r"weights: .*not expected \['teacher'\]"),
        ({"weights": dict.fromkeys(reply(11, 0.1).weights, (0.0,))}, "all local steps were skipped"),
        ({"weights": reply(11, 0.1).weights | {"head": (1.0, 1.0)}}, "head: 2 weights, expected 1"),
        ({"weights": reply(11, 0.1).weights | {"head": ()}}, "head: 0 weights, expected 1"),
        ({"saliency": {"brain-mr": 1e300}}, r"saliency of brain-mr: 1e\+300, expected 0 to"),
        ({"saliency": {"brain-mr": -1e4}}, "saliency of brain-mr: -10000"),
        ({"saliency": {"zz": 1.0}}, "saliency of zz"),
        ({"monitors": {"patients-name": 1.0}}, "monitor patients-name: 1, expected"),
        ({"monitors": {"effective-rank": -1.0}}, "monitor effective-rank: -1, expected 0 to"),
        ({"monitors": {"effective-rank": 1e30}}, r"monitor effective-rank: 1e\+30, expected 0 to"),
        ({"round_number": 4}, "answers round 4 of run-1, expected round 5"),
        ({"run_id": "run-0"}, "answers round 5 of run-0"),
    ],
)
def test_a_bad_reply_is_rejected_and_changes_nothing(strategy, changes, why):
    good = [message(12, reply(12, 0.2)), message(13, reply(13, 0.4))]
    without = aggregate(strategy, *good)
    with_bad = aggregate(strategy, good[0], message(11, reply(11, 0.1, **changes)), good[1])
    assert all(with_bad[group].tobytes() == without[group].tobytes() for group in GLOBAL)
    assert set(strategy.outcome.accepted) == {"b", "c"}
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(strategy.outcome.rejected["a"])


def test_garbage_is_rejected(strategy):
    asked = Message(RecordDict(), 11, "train")
    asked.metadata.__dict__["_message_id"] = "ask"
    aggregate(strategy, Message(RecordDict(), reply_to=asked))
    assert "message: run-id is NoneType" in strategy.outcome.rejected["a"]
    torn = message(11, reply(11, 0.1))
    torn.content.array_records["arrays"]["backbone"] = Array("float32", (2,), "numpy.ndarray", b"torn")
    aggregate(strategy, torn)
    assert "cannot be read" in strategy.outcome.rejected["a"]


def test_a_site_that_answers_twice_counts_once(strategy):
    once = aggregate(strategy, message(11, reply(11, 0.1)))
    twice = aggregate(strategy, message(11, reply(11, 0.1)), message(11, reply(11, 0.3)))
    assert once["backbone"].tobytes() == twice["backbone"].tobytes()
    assert "second reply" in strategy.outcome.rejected["a"]


def test_coded_updates_are_decoded_before_anything_looks_at_them(strategy):
    """Bytes are counted as they came; what cannot be decoded is a rejected reply."""
    sharing = strategy.run.sharing.model_copy(update={"coding": "int8"})
    strategy.run = strategy.run.model_copy(update={"sharing": sharing})
    coded = encode("int8", MANIFEST, reply(11, 0.5).updates)
    new = aggregate(strategy, message(11, reply(11, 0.5, updates=coded)))
    np.testing.assert_allclose(new["backbone"], [1.5, 2.5], rtol=1e-6)
    assert strategy.outcome.bytes_up == {"backbone": 2 + 4, "head": 1 + 4, "stream:brain-mr": 2 + 4}
    for changes, why in (
        ({"head/scale": np.zeros(2, np.float32)}, "head/scale is float32 [2], expected float32 [1]"),
        ({"head/scale": np.full(1, np.nan, np.float32)}, "head: update holds NaN"),
        ({"head": np.zeros(1, np.float32)}, "head is float32 [1], expected int8 [1]"),
        ({"router/scale": np.zeros(1, np.float32)}, "not expected ['router/scale']"),
    ):
        aggregate(strategy, message(11, reply(11, 0.5, updates={**coded, **changes})))
        assert why in strategy.outcome.rejected["a"]


LAYER = "backbone.blocks.0.mlp"
DEX = manifest_of(
    {
        "backbone": {"backbone.a": (1,)},
        "experts": {f"{LAYER}.experts.bias_in": (2, 2)},
        "router": {f"{LAYER}.router.weight": (2, 1)},
        "director": {f"{LAYER}.director.0.bias": (1,)},
    }
)


def dex_reply(value: float, masses: tuple[float, ...], **changes) -> RoundReply:
    updates = {group: np.full(DEX.size(group), value, np.float32) for group in DEX.groups}
    weights = {"backbone": (10.0,), "director": (6.0,), "experts": masses, "router": masses} | changes
    return RoundReply("run-1", 5, 4, updates, weights)


@pytest.fixture
def pooled(make_run) -> GroupedMean:
    """Two sites of ten subjects, one step of a batch of six, two experts."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    run = make_run('[sharing]\nexperts = "pooled"\n')
    run = run.model_copy(
        update={"train": run.train.model_copy(update={"rounds": 10, "local_steps": 1, "learning_rate": 10.0})}
    )
    roster = {node: Handshake(site, 10, {}, {}, "", DEX.hashes()) for node, site in ((11, "a"), (12, "b"))}
    built = GroupedMean(run, DEX, roster)
    arrays = ArrayRecord({group: Array(np.full(DEX.size(group), -0.0, np.float32)) for group in DEX.groups})
    list(built.configure_train(5, arrays, ConfigRecord({"run-id": "run-1"}), None))
    return built


def test_pooled_experts_are_averaged_by_their_gate_mass(pooled):
    new = aggregate(
        pooled,
        message(11, dex_reply(1.0, (4.0, 2.0))),
        message(12, dex_reply(3.0, (0.0, 6.0))),
    )
    assert not pooled.outcome.rejected
    assert new["backbone"].tolist() == [2.0]
    assert new["director"].tolist() == [2.0]
    assert new["experts"].tolist() == [1.0, 1.0, 2.5, 2.5]
    assert new["router"].tolist() == [1.0, 2.5]


def test_an_expert_that_nobody_used_keeps_its_bytes(pooled):
    new = aggregate(pooled, message(11, dex_reply(1.0, (0.0, 6.0))))
    assert np.signbit(new["experts"]).tolist() == [True, True, False, False]
    assert new["experts"].tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"experts": (7.0, 0.0)}, "experts: weight 7, expected 0 to 6.006"),
        ({"router": (0.0, -1.0)}, "router: weight -1"),
        ({"director": (6.1,)}, "director: weight 6.1, expected 0 to 6.006"),
        ({"experts": (6.0,)}, "experts: 1 weights, expected 2"),
        ({"experts": (1.0, 1.0, 1.0)}, "experts: 3 weights, expected 2"),
    ],
)
def test_gate_mass_beyond_the_images_seen_is_rejected(pooled, changes, why):
    aggregate(pooled, message(11, dex_reply(1.0, (4.0, 2.0), **changes)))
    assert why in pooled.outcome.rejected["a"]


def test_flowers_own_loop_can_drive_it(strategy):
    """`Strategy.start` of Flower, two rounds, without our round loop."""

    class Echo:
        def send_and_receive(self, messages, *, timeout=None):
            asked = list(messages)
            number = int(asked[0].metadata.group_id) if asked else 0
            return [
                message(each.metadata.dst_node_id, reply(each.metadata.dst_node_id, 0.25, round_number=number))
                for each in asked
            ]

    initial = ArrayRecord({group: Array(np.array(values, np.float32)) for group, values in GLOBAL.items()})
    result = strategy.start(Echo(), initial, num_rounds=2, train_config=ConfigRecord({"run-id": "run-1"}))
    assert result.arrays["backbone"].numpy().tolist() == [1.5, 2.5]


def test_the_usual_norms_are_remembered_and_bound_the_next_round(strategy):
    aggregate(strategy, message(11, reply(11, 1e-3)), message(12, reply(12, 2e-3)), message(13, reply(13, 9e-3)))
    found = strategy.memory.norms
    assert {site: entries[0] for site, entries in found["backbone"].items()} == {
        site: (5, pytest.approx(norm * 2**0.5)) for site, norm in (("a", 1e-3), ("b", 2e-3), ("c", 9e-3))
    }
    assert sorted(found["stream:brain-mr"]) == ["a", "c"]
    assert "stream:eye-oct" not in found
    answers = message(11, reply(11, 0.3)), message(12, reply(12, 2e-3))
    aggregate(strategy, *answers, memory=strategy.memory)
    assert strategy.outcome.rejected["a"] == "backbone: norm 0.424, expected at most 0.233 (sharing.guards.norm-ratio)"
    assert sorted(strategy.memory.norms["backbone"]) == ["a", "b", "c"]
    assert [len(entries) for entries in strategy.memory.norms["backbone"].values()] == [1, 2, 1]


def test_a_long_update_is_shortened_to_what_is_usual(strategy):
    """Usual for b is the median of a and c; as much is left of it, and its norm is told as it came."""
    aggregate(strategy, message(11, reply(11, 1e-3)), message(12, reply(12, 1e-3)), message(13, reply(13, 3e-3)))
    answers = message(11, reply(11, 0.0)), message(12, reply(12, 8e-3)), message(13, reply(13, 0.0))
    new = aggregate(strategy, *answers, memory=strategy.memory)
    np.testing.assert_allclose(new["backbone"], np.array([1, 2]) + 40 / 100 * 2e-3, rtol=1e-6)
    assert strategy.outcome.norms["b"]["backbone"] == pytest.approx(8e-3 * 2**0.5)


def test_a_sign_flipped_reply_is_rejected(make_run):
    """Weights and norms as ever; only the direction tells, by the votes of the round before."""
    strategy = build(make_run(), roster=ROSTER | {14: shaken("d", 20)})
    good = [message(12, reply(12, 0.2)), message(13, reply(13, 0.4)), message(14, reply(13, 0.3, **only_common(13)))]
    aggregate(strategy, *good, message(11, reply(11, 0.3)))
    before = strategy.memory
    without = aggregate(strategy, *good, memory=before)
    with_flipped = aggregate(strategy, good[0], message(11, reply(11, -0.3)), *good[1:], memory=before)
    assert all(with_flipped[group].tobytes() == without[group].tobytes() for group in GLOBAL)
    assert "points elsewhere: cosine -1.00" in strategy.outcome.rejected["a"]
    assert set(strategy.outcome.accepted) == {"b", "c", "d"}
    aggregate(strategy, *good, message(11, reply(11, 0.3)), memory=before)
    assert strategy.outcome.rejected == {}


@pytest.mark.parametrize("num_turned", [2, 3, 4])
def test_sites_that_turn_together_and_are_no_minority_all_count(make_run, num_turned):
    """Else one round in which honest sites turn would end the run."""
    strategy = build(make_run(), roster=ROSTER | {14: shaken("d", 20)})
    values, nodes = {11: 0.3, 12: 0.2, 13: 0.4, 14: 0.3}, {14: 13}

    def answer(node_id, value):
        told = only_common(13) if node_id == 14 else {}
        return message(node_id, reply(nodes.get(node_id, node_id), value, **told))

    aggregate(strategy, *(answer(node_id, value) for node_id, value in values.items()))
    before = strategy.memory
    turned = {node: -value if index < num_turned else value for index, (node, value) in enumerate(values.items())}
    answers = [answer(node_id, value) for node_id, value in turned.items()]
    new = aggregate(strategy, *answers, memory=before)
    assert strategy.outcome.rejected == {}
    assert set(strategy.outcome.accepted) == {"a", "b", "c", "d"}
    again = aggregate(strategy, *reversed(answers), memory=before)
    assert all(new[group].tobytes() == again[group].tobytes() for group in GLOBAL)


def test_a_stream_without_its_quorum_stays_as_it_was(make_run):
    strategy = build(make_run("[federation]\nsites-per-stream = 2\n"))
    new = aggregate(strategy, message(11, reply(11, 0.1)), message(12, reply(12, 0.2)))
    assert new["stream:brain-mr"].tolist() == GLOBAL["stream:brain-mr"]
    assert new["backbone"].tolist() != GLOBAL["backbone"]
    new = aggregate(strategy, message(11, reply(11, 0.1)), message(13, reply(13, 0.2)))
    assert new["stream:brain-mr"].tolist() != GLOBAL["stream:brain-mr"]


def test_an_optimiser_of_its_own_for_a_group(make_run):
    """Head by momentum, the rest goes where the mean points; the second round is the first's step and half of it."""
    momentum = '[sharing.groups.head.optimiser]\nkind = "momentum"\nmomentum = 0.5\nnesterov = false\n'
    strategy = build(make_run(momentum))
    for _ in range(2):
        new = aggregate(strategy, message(12, reply(12, 0.2)), memory=strategy.memory)
    np.testing.assert_allclose(new["head"], 0.5 + 0.3, rtol=1e-6)
    np.testing.assert_allclose(new["backbone"], [1.2, 2.2], rtol=1e-6)
    assert list(strategy.memory.slots) == ["head"]
    resumed = aggregate(build(make_run(momentum)), message(12, reply(12, 0.2)), memory=strategy.memory)
    np.testing.assert_allclose(resumed["head"], 0.5 + 0.35, rtol=1e-6)
    aggregate(strategy, memory=strategy.memory)
    np.testing.assert_allclose(strategy.memory.slots["head"]["momentum"], 0.3, rtol=1e-6)


def test_a_share_of_the_sites_is_asked(make_run):
    strategy = build(make_run("[federation]\nparticipation = 0.5\n"))
    asked = [each.metadata.dst_node_id for each in strategy.messages]
    assert len(asked) == 2
    assert list(strategy.asked) == asked
    aggregate(strategy, *(message(node_id, reply(node_id, 0.1)) for node_id in asked))
    assert len(strategy.outcome.accepted) == 2


@pytest.mark.parametrize("kind", ["median", "trimmed", "geometric-median", "l-dawa"])
def test_a_group_may_have_a_mean_of_its_own(make_run, kind):
    answers = [message(11, reply(11, 0.1)), message(12, reply(12, 0.2)), message(13, reply(13, 0.6))]
    plain = aggregate(build(make_run()), *answers)
    strategy = build(make_run(f"[sharing.groups.backbone]\nmean = '{kind}'\n"))
    new, again = aggregate(strategy, *answers), aggregate(strategy, *reversed(answers))
    assert all(new[group].tobytes() == plain[group].tobytes() for group in GLOBAL if group != "backbone")
    assert new["backbone"].tobytes() != plain["backbone"].tobytes()
    assert new["backbone"].tobytes() == again["backbone"].tobytes()
    if kind == "median":
        np.testing.assert_allclose(new["backbone"], [1.2, 2.2], rtol=1e-6)


@pytest.mark.parametrize(("value", "num_accepted"), [(0.5, 3), (500.0, 0)])
def test_a_reply_is_let_go_before_the_next_one_comes(strategy, value, num_accepted, monkeypatch):
    """Also one that is refused.

    Flower's records refer to themselves, so only the collector would free what is left in them.
    """
    gc.disable()
    try:
        arrived: list[weakref.ref] = []
        read = strategy._read

        def spied(*about) -> RoundReply:
            arrived.append(weakref.ref(found := read(*about)))
            return found

        monkeypatch.setattr(strategy, "_read", spied)

        def come(node_id: int) -> Message:
            assert not any(array() for array in arrived)
            coming = deepcopy(message(node_id, reply(node_id, value)))
            arrived.extend(map(weakref.ref, coming.content.array_records["arrays"].values()))
            return coming

        strategy.aggregate_train(5, map(come, (11, 12, 13)))
    finally:
        gc.enable()
    assert len(arrived) > 6
    assert len(strategy.outcome.accepted) == num_accepted
