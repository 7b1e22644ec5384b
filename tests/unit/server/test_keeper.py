"""`python -m server keep`: a run that ends in several ways, with a Flower that answers from a list."""

import json
import os
import time

import pytest
from typer.testing import CliRunner

from panfm.errors import RunError
from server import coordinator, flower_cli, keeper
from server.checkpoint import ServerState
from server.coordinator import app
from server.run_folder import ENDED, RunFolder
from tests.unit.report.test_status import line


class Flower:
    """Flower's status of each look, what is submitted, and what a submission leads to."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.status = ["finished:failed"]
        self.submitted = 0
        self.is_down = 0
        self.knows = True
        self.then = [self.finish]

    def __call__(self, words, environment):
        if self.is_down:
            self.is_down -= 1
            raise RunError("the SuperLink does not answer")
        if words[0] == "run":
            self.submitted += 1
            (self.then.pop(0) if self.then else self.finish)()
            return {"run-id": str(100 + self.submitted)}
        if "--run-id" in words and not self.knows:
            self.knows = True
            raise RunError("flwr list: no such run")
        status = self.status.pop(0) if len(self.status) > 1 else self.status[0]
        return {"runs": [{"status": status, "status-details": ""}]}

    def finish(self) -> None:
        (self.folder.path / "model").mkdir()
        (self.folder.path / "model" / "metadata.json").write_text('{"rounds": 2}')


@pytest.fixture
def flower(tmp_path, make_run, monkeypatch) -> Flower:
    """A run of two rounds, started through Flower, one done; its ServerApp was killed."""
    folder = RunFolder.create(tmp_path / "run", make_run())
    (folder.path / "flower.json").write_text('{"run-id": "77", "connection": "lab"}')
    folder.append_round(line(1))
    folder.save_state(ServerState("run-1", 1, {}))
    made = Flower(folder)
    monkeypatch.setattr(flower_cli, "flwr", made)
    monkeypatch.setattr(keeper, "flwr", made)
    made.slept = []
    clock = type("Clock", (), {"sleep": made.slept.append, "time": time.time})
    monkeypatch.setattr(keeper, "time", clock)
    return made


def keep(flower: Flower):
    return CliRunner().invoke(app, ["keep", str(flower.folder.path)])


@pytest.mark.parametrize("status", [["running", "running", "finished:failed"], ["finished:failed"]])
def test_a_run_that_was_killed_goes_on(flower, status):
    looks = len(status)
    flower.status = status
    result = keep(flower)
    assert (result.exit_code, flower.submitted) == (0, 1)
    assert "finished; model" in result.output
    assert json.loads((flower.folder.path / "flower.json").read_text())["run-id"] == "101"
    assert flower.slept.count(10.0) == looks  # between looks, and the pause before it goes on


def test_a_superlink_that_is_gone_is_waited_for(flower):
    flower.is_down = 6
    assert keep(flower).exit_code == 0
    assert flower.submitted == 1


def test_a_superlink_that_has_forgotten_the_run_gets_it_again(flower):
    flower.knows = False
    flower.status = ["running"]
    assert keep(flower).exit_code == 0
    assert flower.submitted == 1


@pytest.mark.parametrize(
    ("state", "can_heal", "words"),
    [("stopped", False, "was stopped by the coordinator"), ("failed", False, "cannot go on by itself: enough")],
)
def test_a_run_that_was_stopped_or_cannot_heal_stays_ended(flower, state, can_heal, words):
    flower.folder.note_end("enough", state=state, can_heal=can_heal)
    result = keep(flower)
    assert (result.exit_code, flower.submitted) == (3, 0)
    assert words in result.output


def test_a_run_that_flower_stopped_stays_stopped(flower):
    flower.status = ["finished:stopped"]
    assert keep(flower).exit_code == 3


def test_a_lost_quorum_heals(flower):
    flower.folder.note_end("round 2: no quorum", can_heal=True)
    assert keep(flower).exit_code == 0


def test_an_internal_error_that_comes_back_ends_it(flower, monkeypatch):
    monkeypatch.setattr(coordinator, "_submit", lambda *_: flower.submit())
    calls = []

    def submit() -> None:
        calls.append(len(calls))

    flower.submit = submit
    flower.folder.note_end("internal error (KeyError); the server's log tells more", can_heal=True)
    result = keep(flower)
    assert (result.exit_code, len(calls)) == (3, 5)
    assert [pause for pause in flower.slept if pause > 10.0] == [20.0, 40.0, 80.0, 160.0]
    assert "6 times in a row: internal error" in result.output


def test_a_keeper_that_was_killed_before_it_noted_the_id_waits_for_that_serverapp(flower, monkeypatch):
    """Flower has taken the run; its ServerApp finishes it. Without one the run is submitted after a minute."""
    marker = flower.folder.path / keeper.SUBMITTING
    marker.touch()
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            flower.finish()

    monkeypatch.setattr(keeper.time, "sleep", sleep)
    assert keep(flower).exit_code == 0
    assert flower.submitted == 0
    (flower.folder.path / "model" / "metadata.json").unlink()
    (flower.folder.path / "model").rmdir()
    os.utime(marker, (time.time() - 61.0,) * 2)
    monkeypatch.setattr(keeper.time, "sleep", lambda _: None)
    assert keep(flower).exit_code == 0
    assert flower.submitted == 1
    assert not marker.exists()
    assert not (flower.folder.path / ENDED).exists()


def test_a_run_that_is_stopped_before_it_is_submitted_again_stays_stopped(flower, monkeypatch):
    """`stop` is taken between two attempts, too."""
    flower.folder.note_end("round 2: no quorum", can_heal=True)

    def stop(_: float) -> None:
        result = CliRunner().invoke(app, ["stop", str(flower.folder.path)])
        assert (result.exit_code, "stopped after 1 of 2 rounds" in result.output) == (0, True), result.output

    monkeypatch.setattr(keeper.time, "sleep", stop)
    result = keep(flower)
    assert (result.exit_code, flower.submitted) == (3, 0)
    assert "was stopped by the coordinator" in result.output


def test_a_run_that_ends_without_a_word_again_and_again_is_given_up(flower, monkeypatch):
    calls = []
    monkeypatch.setattr(coordinator, "_submit", lambda *_: calls.append(0))
    result = keep(flower)
    assert (result.exit_code, len(calls)) == (3, 5)
    assert "6 times in a row: ended without a word" in result.output


def test_a_damaged_run_folder_is_given_up(flower):
    (flower.folder.path / "events.jsonl").write_text("no event\n")
    result = keep(flower)
    assert (result.exit_code, flower.submitted) == (3, 0)
    assert "events.jsonl:1" in result.output


def test_commands_that_decide_on_a_run_take_turns(flower, monkeypatch):
    monkeypatch.setattr(keeper, "_TURN_S", 0.0)
    with keeper.in_turn(flower.folder.path):
        for command in ("stop", "resume"):
            result = CliRunner().invoke(app, [command, str(flower.folder.path)])
            assert "another command decides on this run" in str(result.exception), command
    assert flower.submitted == 0
