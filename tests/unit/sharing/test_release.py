from dataclasses import fields

import numpy as np
import pytest

from panfm.config import Releasable, experiment_hash
from panfm.errors import ProtocolError
from panfm.sharing.messages import Handshake, RoundReply, RoundTask
from panfm.sharing.release import (
    HANDSHAKE_RELEASED_UNDER,
    NEEDED,
    RELEASED_UNDER,
    SUMS_RELEASED_UNDER,
    RoundResult,
    build_handshake,
    build_reply,
    build_sums_reply,
)
from panfm.sharing.sums_messages import SumsReply
from tests.conftest import manifest_of

TASK = RoundTask("run-1", 2, "", {"backbone": np.array([1, 2], np.float32)})
RESULT = RoundResult(
    state_round=1,
    updates={"backbone": np.array([0.5, 0], np.float32)},
    weights={"backbone": (10.0,)},
    loss=0.25,
    validation_loss=0.75,
    num_skipped=3,
    saliency={"brain-mr": 1.0},
    monitors={"effective-rank": 2.5},
)
HANDSHAKE_PROTOCOL = {"site", "versions", "experiment"}
PROTOCOL = {"run_id", "round_number", "state_round"}


def test_every_field_of_a_reply_is_released_under_a_name():
    assert {field.name for field in fields(RoundReply)} == set(RELEASED_UNDER) | PROTOCOL


def test_every_field_of_a_handshake_is_released_under_a_name():
    assert {field.name for field in fields(Handshake)} == set(HANDSHAKE_RELEASED_UNDER) | HANDSHAKE_PROTOCOL
    assert set(HANDSHAKE_RELEASED_UNDER.values()) <= set(NEEDED)


def test_a_handshake_by_hand(small_run):
    manifest = manifest_of({"backbone": {"backbone.a": (2,)}})
    words = {"subjects": 9, "streams": {"brain-mr": 4}}
    shaken = build_handshake("alpha", experiment_hash(small_run), manifest, {"panfm": "1"}, **words, may_leave=NEEDED)
    assert shaken == Handshake(
        "alpha", 9, {"brain-mr": 4}, {"panfm": "1"}, experiment_hash(small_run), manifest.hashes()
    )
    for needed in NEEDED:
        with pytest.raises(ProtocolError, match=f"lacks {needed}"):
            build_handshake(
                "alpha", experiment_hash(small_run), manifest, {}, **words, may_leave=set(Releasable) - {needed}
            )


def test_a_reply_by_hand():
    reply = build_reply(TASK, RESULT, may_leave=tuple(Releasable))
    assert reply.updates["backbone"].tolist() == [0.5, 0]
    assert reply == RoundReply(
        "run-1", 2, 1, reply.updates, {"backbone": (10.0,)}, 0.25, 0.75, 3, {"brain-mr": 1.0}, {"effective-rank": 2.5}
    )


@pytest.mark.parametrize("withheld", [Releasable.LOSS, Releasable.SALIENCY, Releasable.MONITORS])
def test_what_is_not_allowed_is_absent(withheld):
    reply = build_reply(TASK, RESULT, may_leave=[name for name in Releasable if name != withheld])
    absent = RoundReply("", 0, 0, {}, {})
    for field, name in RELEASED_UNDER.items():
        if name == withheld:
            assert getattr(reply, field) == getattr(absent, field)
        else:
            assert getattr(reply, field) != getattr(absent, field)


@pytest.mark.parametrize("needed", [Releasable.UPDATES, Releasable.COUNTS])
def test_without_updates_and_counts_there_is_no_reply(needed):
    with pytest.raises(ProtocolError, match=f"lacks {needed}"):
        build_reply(TASK, RESULT, may_leave=[name for name in Releasable if name != needed])


def test_every_field_of_an_answer_with_sums_is_released_under_a_name():
    assert {field.name for field in fields(SumsReply)} == set(SUMS_RELEASED_UNDER) | {"run_id", "round_number"}


def test_sums_leave_under_their_own_names():
    result = {"sums": {"old": {"x": np.ones(2)}}, "errors": {"old": np.ones(3)}, "loss": 2.5, "loss_subjects": 4}
    assert build_sums_reply(TASK, result, may_leave=tuple(Releasable)) == SumsReply("run-1", 2, **result)
    assert build_sums_reply(TASK, result, may_leave=(Releasable.LOSS,)) == SumsReply("run-1", 2, loss=2.5)
    assert build_sums_reply(TASK, result, may_leave=NEEDED) == SumsReply("run-1", 2, loss_subjects=4)


def test_a_score_leaves_under_its_own_name():
    result = {"score": {"auc": np.ones(4)}, "scored": 12}
    assert build_sums_reply(TASK, result, may_leave=tuple(Releasable)) == SumsReply("run-1", 2, **result)
    others = [name for name in Releasable if name != Releasable.EVALUATION]
    assert build_sums_reply(TASK, result, may_leave=others) == SumsReply("run-1", 2, scored=12)
