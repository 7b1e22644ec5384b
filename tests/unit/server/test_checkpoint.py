from dataclasses import replace

import numpy as np
import pytest

from panfm.errors import DataError
from panfm.files import write_checked
from server.checkpoint import ServerState, load_latest, load_round, save_state
from strategies import Memory


def state(number: int, profile: dict[str, float] | None = None) -> ServerState:
    groups = {"backbone": np.array([0.1, number], np.float32), "stream:a-mr": np.zeros(0, np.float32)}
    return ServerState("run-1", number, groups, profile)


def test_round_trip(tmp_path):
    save_state(tmp_path, state(1, {"a-mr": 1 / 3}))
    back = load_latest(tmp_path)
    assert (back.run_id, back.round_number, back.profile) == ("run-1", 1, {"a-mr": 1 / 3})
    for group, flat in state(1).groups.items():
        assert back.groups[group].tobytes() == flat.tobytes()
        assert back.groups[group].dtype == np.float32


def test_nothing_yet(tmp_path):
    assert load_latest(tmp_path / "absent") is None


def test_the_last_three_are_kept_and_the_newest_is_loaded(tmp_path):
    for number in range(1, 12):
        save_state(tmp_path, state(number))
    assert len(list(tmp_path.iterdir())) == 3
    assert load_latest(tmp_path).round_number == 11
    assert load_latest(tmp_path).profile is None
    assert load_round(tmp_path, 9).round_number == 9


def test_a_corrupted_checkpoint_is_named(tmp_path):
    save_state(tmp_path, state(2))
    path = tmp_path / "round-000002.state"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"round-000002\.state: corrupted"):
        load_latest(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{}\n", b"{}", b"nonsense", b'{"run-id": "r", "round": 1, "profile": null}\nx']
)
def test_a_file_of_another_kind_is_named(tmp_path, content):
    write_checked(tmp_path / "round-000001.state", content)
    with pytest.raises(DataError, match=r"round-000001\.state: not a checkpoint"):
        load_latest(tmp_path)


def test_the_memory_of_the_strategy_comes_back(tmp_path):
    slots = {"backbone": {"first": np.array([0.1, 1 / 3], np.float32), "second": np.array([1e-9, 2.0], np.float32)}}
    step = {"backbone": np.array([1, -128], np.int8), "backbone/scale": np.array([0.5], np.float32)}
    kept = {"backbone": np.array([-0.0, 1e-9], np.float32)}
    norms = {"backbone": {"a": ((1, 0.1), (2, 1 / 3))}, "stream:a-mr": {}}
    votes = {"backbone": np.array([3, -128], np.int8), "stream:a-mr": np.array([300], np.int16)}
    memory = Memory(norms, slots, step, kept, holders=("a", "b"), average=kept, votes=votes)
    memory.cosines, memory.voters = {"backbone": {"a": 0.1, "b": -1 / 3}}, {"backbone": ("a", "b")}
    memory.frozen_holders = ("a", "c")
    save_state(tmp_path, replace(state(1), memory=memory))
    back = load_latest(tmp_path)
    assert set(back.groups) == {"backbone", "stream:a-mr"}
    assert back.memory.norms == memory.norms
    assert back.memory.cosines == memory.cosines
    assert back.memory.voters == memory.voters
    assert list(back.memory.slots) == ["backbone"]
    assert back.memory.holders == ("a", "b")
    assert back.memory.frozen_holders == ("a", "c")
    for part in ("step", "lost", "average", "votes"):
        ours, theirs = getattr(back.memory, part), getattr(memory, part)
        assert {name: (array.dtype, array.tobytes()) for name, array in ours.items()} == {
            name: (array.dtype, array.tobytes()) for name, array in theirs.items()
        }
    for slot, flat in slots["backbone"].items():
        assert back.memory.slots["backbone"][slot].tobytes() == flat.tobytes()
