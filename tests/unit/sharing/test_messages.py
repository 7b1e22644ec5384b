import numpy as np
import pytest

from panfm.errors import ProtocolError
from panfm.sharing.messages import Handshake, Invitation, Records, RoundReply, RoundTask

ARRAYS = {"backbone": np.arange(3, dtype=np.float32)}
HANDSHAKE = Handshake("a", 7, {"brain-mr": 5}, {"panfm": "1"}, "5e" * 32, {"backbone": "layout"})
TASK = RoundTask("run-1", 2, "name = 'x'", ARRAYS, {"brain-mr": 1.5})
STEP = RoundTask("run-1", 3, "x", ARRAYS, None, {"backbone": "digest"}, {"backbone": np.ones(3, np.float32)})
REPLY = RoundReply("run-1", 2, 1, ARRAYS, {"backbone": (14.0,)}, 0.5, 0.6, 0, {"brain-mr": 1.0}, {"experts-used": 2.0})


@pytest.mark.parametrize("message", [Invitation("name = 'x'"), HANDSHAKE, TASK, REPLY])
def test_round_trip(message):
    assert type(message).from_records(message.to_records()) == message


def test_round_trip_of_a_step_and_a_teacher():
    back = RoundTask.from_records(STEP.to_records())
    assert (back.groups, back.digests) == (STEP.groups, STEP.digests)
    assert back.teacher["backbone"] is STEP.teacher["backbone"]
    assert not TASK.to_records().config.keys() & {"digests-names", "digests-values"}


def test_what_is_withheld_comes_back_as_absent():
    reply = RoundReply("run-1", 2, 1, ARRAYS, {"backbone": (14.0,)})
    back = RoundReply.from_records(reply.to_records())
    assert (back.loss, back.validation_loss, back.num_skipped, back.saliency) == (None, None, None, {})
    assert RoundTask.from_records(RoundTask("r", 1, "", ARRAYS).to_records()).profile is None


@pytest.mark.parametrize("message", [Invitation("x"), HANDSHAKE, TASK, REPLY])
def test_every_missing_word_is_named(message):
    records = message.to_records()
    for key in records.config:
        if key == "profile-names":
            continue
        rest = {name: value for name, value in records.config.items() if name != key}
        with pytest.raises(ProtocolError, match="message: "):
            type(message).from_records(Records(records.arrays, records.metrics, rest))


@pytest.mark.parametrize(("key", "value"), [("round", "2"), ("run-id", 3), ("state-round", None), ("state-round", [1])])
def test_wrong_types_are_refused(key, value):
    records = REPLY.to_records()
    with pytest.raises(ProtocolError, match=f"message: {key}"):
        RoundReply.from_records(Records(records.arrays, records.metrics, {**records.config, key: value}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None])
def test_weights_and_saliency_are_finite_numbers(value):
    records = REPLY.to_records()
    for key, found in (("weight/backbone", [1.0, value]), ("weight/backbone", value), ("saliency/brain-mr", value)):
        with pytest.raises(ProtocolError, match=key):
            RoundReply.from_records(Records(records.arrays, {**records.metrics, key: found}, records.config))


def test_uneven_tables_are_refused():
    config = {**HANDSHAKE.to_records().config, "streams-values": []}
    with pytest.raises(ProtocolError, match="streams is not a table"):
        Handshake.from_records(Records(config=config))


@pytest.mark.parametrize("name", [7, b"x"])
def test_names_that_are_no_text_are_refused(name):
    config = {**HANDSHAKE.to_records().config, "streams-names": [name], "streams-values": [1]}
    with pytest.raises(ProtocolError, match="streams is not a table"):
        Handshake.from_records(Records({}, {}, config))
