"""A site that says it is large, or turns its updates round, does not own the model."""

from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from panfm.sharing.groups import GroupManifest
from panfm.sharing.messages import Handshake, RoundReply
from server.round_line import federated_profile
from strategies import GroupedMean, Memory
from tests.conftest import manifest_of

MANIFEST = manifest_of({"backbone": {"backbone.a": (3,)}, "stream:brain-mr": {"streams.brain-mr.c": (2,)}})
LIE = 1_000_000
_ROUND = 3


def handshake(name: str, subjects: int, manifest: GroupManifest = MANIFEST) -> Handshake:
    return Handshake(name, subjects, {"brain-mr": subjects}, {}, "", manifest.hashes())


def asked(run, roster, manifest=MANIFEST, number: int = _ROUND, memory: Memory | None = None) -> GroupedMean:
    """A strategy that has asked for a round of twenty."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    changes = {"rounds": 20, "local_steps": 2, "batch_size": 6, "learning_rate": 0.1, "warmup": 0.0}
    run = run.model_copy(update={"train": run.train.model_copy(update=changes)})
    strategy = GroupedMean(run, manifest, roster, memory)
    arrays = {group: Array(np.zeros(manifest.size(group), np.float32)) for group in manifest.groups}
    list(strategy.configure_train(number, ArrayRecord(arrays), ConfigRecord({"run-id": "run"}), None))
    return strategy


def message(node: int, reply: RoundReply) -> Message:
    records = reply.to_records()
    arrays = ArrayRecord({name: Array(array) for name, array in records.arrays.items()})
    content = {"arrays": arrays, "metrics": MetricRecord(dict(records.metrics)), "config": ConfigRecord(records.config)}
    question = Message(RecordDict(), node, "train")
    question.metadata.__dict__["_message_id"] = f"ask-{node}"
    return Message(RecordDict(content), reply_to=question)


def answer(node: int, shaken: Handshake, value: float, **changes) -> Message:
    updates = {group: np.full(MANIFEST.size(group), value, np.float32) for group in MANIFEST.groups}
    weights = {"backbone": (2.0 * shaken.subjects,), "stream:brain-mr": (float(shaken.subjects),)}
    return message(node, RoundReply("run", _ROUND, 2, updates, weights, **changes))


def moved(strategy: GroupedMean, *messages: Message) -> dict[str, np.ndarray]:
    arrays, _ = strategy.aggregate_train(_ROUND, iter(messages))
    return {group: array.numpy() for group, array in arrays.items()}


def run_with(make_run, mean: str):
    return make_run(f"[sharing]\nmean = '{mean}'\ntrim = 0.1\n")


@pytest.mark.parametrize("mean", ["weighted", "trimmed", "geometric-median", "l-dawa"])
def test_one_of_five_says_a_million_subjects_and_moves_no_group_by_more_than_its_cap(make_run, mean):
    """The others stand still: what is moved is the liar's share of its update."""
    roster = {node: handshake(f"site-{node}", 100 if node < 5 else LIE) for node in range(1, 6)}
    strategy = asked(run_with(make_run, mean), roster)
    new = moved(strategy, *(answer(node, shaken, 0.1 * (node == 5)) for node, shaken in roster.items()))
    assert set(strategy.outcome.accepted) == {f"site-{node}" for node in range(1, 6)}
    assert all(np.abs(numbers).max() <= 0.5 * 0.1 * (1 + 1e-6) for numbers in new.values())


@pytest.mark.parametrize("mean", ["weighted", "trimmed", "geometric-median", "l-dawa"])
def test_two_of_five_that_lie_together_have_no_more_than_a_cap_each(make_run, mean):
    """Nor when the honest ones are missing, so that the median site is a liar: three replies, of which one counts."""
    roster = {node: handshake(f"site-{node}", 100 if node < 3 else LIE) for node in range(1, 6)}
    strategy = asked(run_with(make_run, mean), roster)
    new = moved(strategy, *(answer(node, roster[node], 0.1 * (node == 5)) for node in (1, 2, 5)))
    assert all(np.abs(numbers).max() <= 0.5 * 0.1 * (1 + 1e-6) for numbers in new.values())


def test_the_cap_is_on_the_replies_that_count_whatever_their_order(make_run):
    """A fourth, refused for its norm, helps nobody over the cap; all orders give the same bits."""
    roster = {node: handshake(f"site-{node}", subjects) for node, subjects in enumerate((10, 20, LIE, LIE), start=1)}
    results = set()
    for order in permutations(roster):
        strategy = asked(make_run(), roster)
        values = {1: 0.01, 2: -0.02, 3: 0.1, 4: 9.0}
        new = moved(strategy, *(answer(node, roster[node], values[node]) for node in order))
        assert set(strategy.outcome.rejected) == {"site-4"}
        results.add(b"".join(new[group].tobytes() for group in sorted(new)))
    assert len(results) == 1
    level = 30 * 2
    expected = (20 * 0.01 - 40 * 0.02 + level * 0.1) / (2 * level)
    np.testing.assert_allclose(new["backbone"], expected, rtol=1e-3)


def test_one_site_does_not_own_profile_and_loss_of_the_federation(make_run):
    from server.round_line import mean_loss

    replies = []
    for node in range(1, 6):
        weights = {"backbone": (LIE if node == 5 else 1.0,), "stream:a-mr": (LIE if node == 5 else 1.0,)}
        saliency = {"a-mr": 2.0 if node == 5 else 0.0, "b-mr": 0.0}
        replies.append(RoundReply("run", 1, 0, {}, weights, loss=2.0 * (node == 5), saliency=saliency))
    assert federated_profile(replies, 0.5)["a-mr"] <= 1.0
    assert mean_loss({str(number): reply for number, reply in enumerate(replies)}, 0.5) <= 1.0


EXPERTS = manifest_of(
    {
        "backbone": {"backbone.a": (1,)},
        **{
            part.split(".")[0]: {f"backbone.blocks.{layer}.mlp.{part}": shape for layer in (0, 1)}
            for part, shape in (("director.w", (1,)), ("experts.w", (4, 1)), ("router.weight", (4, 1)))
        },
    }
)


@pytest.mark.parametrize(
    ("masses", "director", "why"),
    [
        ([12.0] * 8, 24.0, "experts: gate mass 48 in backbone.blocks.0.mlp, expected at most"),
        ([3.0] * 4 + [12.0, 0.0, 0.0, 12.0], 24.0, "gate mass 24 in backbone.blocks.1.mlp"),
        ([3.0] * 4 + [1.0] * 4, 24.0, "gate mass 4 in backbone.blocks.1.mlp, expected 12 as in other layers"),
        ([1.0] * 8, 24.0, "director: weight 24, expected 8, its layers' gate mass"),
    ],
    ids=["every expert at most", "one layer twice", "layers differ", "director of more images"],
)
def test_gate_mass_that_no_images_have_is_refused(make_run, masses, director, why):
    """Two steps of batches of six: 12 images."""
    run = make_run("[sharing]\nexperts = 'pooled'\n[model]\nbackbone = 'director-experts'\n")
    roster = {node: handshake(f"site-{node}", 10, EXPERTS) for node in (1, 2)}
    strategy = asked(run, roster, EXPERTS)
    updates = {group: np.zeros(EXPERTS.size(group), np.float32) for group in EXPERTS.groups}
    weights = {"backbone": (20.0,), "director": (director,), "experts": tuple(masses), "router": tuple(masses)}
    moved(strategy, message(1, RoundReply("run", _ROUND, 2, updates, weights)))
    assert why in strategy.outcome.rejected["site-1"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 2**40), min_size=3, max_size=9),
    st.sampled_from([0.02, 0.1, 0.25, 1 / 3, 0.4, 0.5, 0.9, 1.0]),
)
def test_no_weights_give_a_site_more_than_its_cap(weights, max_share):
    from strategies.weight_caps import capped_weights, water_level

    contributing = sum(map(bool, weights))
    level = water_level(weights, max_share)
    lowered = [Fraction(weight) if level is None else min(Fraction(weight), level) for weight in weights]
    if contributing >= 3:
        cap = max(Fraction(max_share), Fraction(1, contributing))
        assert max(lowered) <= cap * sum(lowered)
        if level is not None:
            assert max(lowered) == cap * sum(lowered)  # and no lower than needed
    else:
        assert level is None
    assert capped_weights(weights, max_share) == [float(weight) for weight in lowered]
