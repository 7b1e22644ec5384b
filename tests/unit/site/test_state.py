import pytest
import torch

from panfm.errors import DataError, ProtocolError
from panfm.site.state import Origin, StateStore

ORIGIN = Origin("e" * 64, "none", "p" * 16)


def state(value: float) -> dict[str, torch.Tensor]:
    return {"teacher.a": torch.full((2, 3), value), "optimiser.step.a": torch.tensor(value), "n": torch.tensor([3])}


def test_round_trip(tmp_path):
    states = StateStore(tmp_path, "run-1", ORIGIN)
    digest = states.save(1, state(0.1))
    back = states.load(1)
    assert back.keys() == state(0.1).keys()
    for name, tensor in state(0.1).items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == tensor.dtype
    assert states.digest(1) == digest
    assert states.digest(2) == ""


def test_the_newest_earlier_round_is_found(tmp_path):
    states = StateStore(tmp_path, "run-1", ORIGIN)
    assert states.round_before(1) == 0
    for number in (1, 2, 4):
        states.save(number, state(number))
    assert [states.round_before(number) for number in (1, 2, 3, 4, 5, 9)] == [0, 1, 2, 2, 4, 4]


def test_the_last_three_are_kept_and_later_ones_go(tmp_path):
    states = StateStore(tmp_path, "run-1", ORIGIN)
    for number in range(1, 6):
        states.save(number, state(number))
    assert sorted(path.name for path in states.folder.iterdir()) == [f"round-00000{n}.state" for n in (3, 4, 5)]
    states.save(4, state(4))
    assert sorted(path.name for path in states.folder.iterdir()) == [f"round-00000{n}.state" for n in (3, 4)]


def test_runs_do_not_meet(tmp_path):
    StateStore(tmp_path, "run-1", ORIGIN).save(1, state(1))
    assert StateStore(tmp_path, "run-2", ORIGIN).round_before(9) == 0


def test_a_truncated_file_is_named_and_not_used(tmp_path):
    states = StateStore(tmp_path, "run-1", ORIGIN)
    states.save(7, state(1))
    path = tmp_path / "runs" / "run-1" / "round-000007.state"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"round-000007\.state: corrupted"):
        states.load(7)


@pytest.mark.parametrize("run_id", ["", "..", "../x", "a/b", "/etc", "A", "x" * 65, "a\n", ".hidden"])
def test_a_run_id_cannot_leave_the_folder(tmp_path, run_id):
    with pytest.raises(ProtocolError, match="run id"):
        StateStore(tmp_path, run_id)
