"""Questions for sums over patients, and answers: the way through frames and back, and what is refused."""

import numpy as np
import pytest

from panfm.errors import ProtocolError
from panfm.sharing.frames import Frame, Kind, decode, encode
from panfm.sharing.messages import Records, RoundTask
from panfm.sharing.sums_messages import Purpose, SumsReply, SumsTask

MODEL = RoundTask("run-1", 4, "name", {"backbone": np.ones(3, np.float32)}, frozen={"head": np.ones(2, np.float32)})


def sent(records):
    """The records at the other end of a socket."""
    content, head = encode(Frame(Kind.SUMS, records)), 24
    size = int.from_bytes(content[8:16], "little")
    return decode(content[head : head + size], content[head + size :]).records


def test_a_question_comes_back_with_its_paths_and_parameters_apart():
    task = SumsTask(MODEL, Purpose.ERRORS, {"old": {"axes": np.arange(4.0).reshape(2, 2), "count": np.array(9.0)}})
    again = SumsTask.from_records(sent(task.to_records()))
    assert (again.purpose, again.model.run_id, again.model.round_number) == (Purpose.ERRORS, "run-1", 4)
    assert (list(again.model.groups), list(again.model.frozen)) == (["backbone"], ["head"])
    assert again.paths["old"]["axes"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert again.paths["old"]["axes"].dtype == np.float64


def test_an_answer_comes_back():
    sums = {"old": {"x": np.ones(2), "xx": np.ones((2, 2))}}
    again = SumsReply.from_records(sent(SumsReply("run-1", 4, sums, {"old": np.ones((13, 1))}, 2.5, 4).to_records()))
    assert (again.run_id, again.round_number, again.loss, again.loss_subjects) == ("run-1", 4, 2.5, 4)
    assert {name: array.size for name, array in again.sums["old"].items()} == {"x": 2, "xx": 4}
    assert again.errors["old"].size == 13
    assert SumsReply.from_records(SumsReply("r", 1).to_records()) == SumsReply("r", 1)


@pytest.mark.parametrize(
    "config",
    [
        {"run-id": "r", "round": 1, "run": "x"},
        {"run-id": "r", "round": 1, "run": "x", "purpose": "all"},
        {"run-id": "r", "round": "1", "run": "x", "purpose": "gate"},
    ],
)
def test_a_question_that_is_none_is_refused(config):
    with pytest.raises(ProtocolError):
        SumsTask.from_records(Records(config=config))
