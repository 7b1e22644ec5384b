"""`python -m server` over run folders, with a Flower that answers from a list. The real one: test_coordinator.py."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from panfm.config import dump_toml, experiment_hash
from panfm.errors import PanfmError, RunError
from panfm.files import locked
from server import console as console_module
from server import coordinator, flower_cli
from server.checkpoint import ServerState
from server.console import Lines, follow
from server.coordinator import app
from server.run_folder import RunFolder
from tests.unit.report.test_status import line

ROOT = Path(__file__).resolve().parents[3]


class Flower:
    """Answers of `flwr`, and what it was asked."""

    def __init__(self) -> None:
        self.status = ["finished:completed"]
        self.asked: list[list[str]] = []
        self.error = ""
        self.on_stop = lambda: None

    def __call__(self, words, environment):
        self.asked.append(words)
        assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
        if self.error:
            raise RunError(self.error)
        if words[0] == "run":
            return {"run-id": "77"}
        if words[0] == "stop":
            self.on_stop()
            return {}
        status = self.status.pop(0) if len(self.status) > 1 else self.status[0]
        return {"runs": [{"status": status, "status-details": "no\x1b heart\nbeat"}]}


@pytest.fixture
def superlink(monkeypatch) -> Flower:
    made = Flower()
    monkeypatch.setattr(flower_cli, "flwr", made)
    for module in (coordinator, console_module):
        monkeypatch.setattr(module, "_POLL_S", 0.0)
    monkeypatch.setattr(console_module, "_STATUS_S", 0.0)
    return made


@pytest.fixture
def experiment(tmp_path, make_run) -> Path:
    path = tmp_path / "experiment.toml"
    path.write_text(dump_toml(make_run()))
    return path


@pytest.fixture
def begun(tmp_path, make_run) -> RunFolder:
    """A run of two rounds, started through Flower, one done."""
    folder = RunFolder.create(tmp_path / "run", make_run())
    (folder.path / "flower.json").write_text('{"run-id": "77", "connection": "lab"}')
    folder.append_round(line(1))
    folder.save_state(ServerState("run-1", 1, {}))
    return folder


def finish(folder: RunFolder) -> None:
    (folder.path / "model").mkdir()
    (folder.path / "model" / "metadata.json").write_text('{"rounds": 2}')


def call(*words: object):
    """Exit status, output, and the one line that says why."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(done.exception, PanfmError):
        return 1, done.output, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output, ""


def test_start_hands_the_resolved_run_to_flower(superlink, experiment, tmp_path):
    out = tmp_path / "run"
    code, told, _ = call("start", experiment, "--connection", "lab", "--set", "seed=9", "--out", out, "--detach")
    made = RunFolder.resume(out).run
    assert (code, told) == (0, f"{out}: Flower's run 77 on connection lab\nexperiment {experiment_hash(made)}\n")
    [[_, root, connection, _, words]] = superlink.asked
    assert (Path(root), connection) == (ROOT, "lab")
    assert words == f'run-dir="{out}" resume="{out}"'
    assert RunFolder.resume(out).run.seed == 9
    assert json.loads((out / "flower.json").read_text()) == {"run-id": "77", "connection": "lab"}


def test_start_that_flower_does_not_take_leaves_nothing(superlink, experiment, tmp_path):
    superlink.error = "connection lab: does not answer"
    assert call("start", experiment, "--connection", "lab", "--out", tmp_path / "run")[::2] == (1, superlink.error)
    assert not (tmp_path / "run").exists()


def test_start_tells_the_truth_where_flower_does_not(superlink, experiment, tmp_path):
    """The ServerApp crashed before it did anything."""
    superlink.status = ["pending", "running", "finished:failed"]
    code, _, why = call("start", experiment, "--connection", "lab", "--out", tmp_path / "run")
    assert code == 1
    assert why == (f"{tmp_path / 'run'}: not begun after 0 of 2 rounds; Flower: finished:failed: no? heart beat")


def test_completed_without_a_model_is_a_failure(superlink, begun):
    code, _, why = call("watch", begun.path)
    assert (code, why) == (
        1,
        f"{begun.path}: interrupted after 1 of 2 rounds; Flower: finished:completed: no? heart beat",
    )


def test_watch_shows_every_round_once_and_ends_with_the_run(superlink, begun, monkeypatch):
    superlink.status = ["running", "running", "finished:completed"]
    steps = iter([lambda: begun.append_round(line(2)), lambda: finish(begun)])
    monkeypatch.setattr(console_module.time, "sleep", lambda _: next(steps)())
    code, told, _ = call("watch", begun.path)
    assert code == 0
    assert told.count("round 1/2") == told.count("round 2/2") == 1
    assert "round 1: b left out: update holds NaN" in told
    assert "round 1: c offline" in told
    assert told.endswith(f"{begun.path}: finished; model: {begun.path / 'model'}\n")


def test_a_run_of_another_kind_is_watched_while_a_process_is_at_work(begun, monkeypatch):
    (begun.path / "flower.json").unlink()
    console = Console(file=io.StringIO(), width=200)
    with begun.at_work():
        steps = iter([lambda: begun.append_round(line(2)), KeyboardInterrupt])

        def sleep(_):
            step = next(steps)
            if step is KeyboardInterrupt:
                raise KeyboardInterrupt
            step()

        monkeypatch.setattr(console_module.time, "sleep", sleep)
        with pytest.raises(KeyboardInterrupt):  # it goes on for as long as the other does
            follow(begun.path, Lines(console), None, {})
    assert "round 2/2" in console.file.getvalue()
    with pytest.raises(RunError, match="interrupted after 2 of 2 rounds"):
        follow(begun.path, Lines(console), None, {})


def test_the_servers_own_reason_comes_first(superlink, begun):
    superlink.status = ["finished:failed"]
    begun.note_end("round 2: 1 good replies, at least 2 needed")
    code, _, why = call("watch", begun.path)
    assert (code, why) == (
        1,
        f"{begun.path}: failed after 1 of 2 rounds: round 2: 1 good replies, at least 2 needed",
    )


def test_status_of_a_run_that_runs_and_of_one_that_is_done(superlink, begun):
    with begun.at_work():
        code, told, _ = call("status", begun.path)
    assert code == 0
    assert "1 of 2 rounds, running" in told
    assert "update holds NaN" in told
    finish(begun)
    assert call("status", begun.path)[0] == 0
    assert superlink.asked == []


def test_status_of_a_run_that_was_killed(superlink, begun):
    superlink.status = ["finished:failed"]
    code, told, why = call("status", begun.path)
    assert code == 1
    assert "1 of 2 rounds, interrupted" in told
    assert why.endswith("Flower: finished:failed: no? heart beat")


def test_status_of_a_run_that_flower_has_not_begun(superlink, begun):
    superlink.status = ["pending"]
    code, told, _ = call("status", begun.path)
    assert code == 0
    assert "Flower: run 77 is pending" in told


def test_stop_waits_for_the_server_and_says_how_far_it_came(superlink, begun):
    superlink.status = ["running"]
    code, told, _ = call("stop", begun.path)
    assert (code, told) == (0, f"{begun.path}: stopped after 1 of 2 rounds\n")
    assert superlink.asked[-1] == ["stop", "77", "lab"]
    assert "1 of 2 rounds, stopped: by the coordinator" in (begun.path / "status.html").read_text()


def test_a_server_that_does_not_end_is_told_of(superlink, begun, monkeypatch):
    superlink.status = ["running"]
    monkeypatch.setattr(coordinator, "_STOP_S", 0.0)
    with begun.at_work():
        code, _, why = call("stop", begun.path)
    assert (code, why) == (1, f"{begun.path}: Flower has stopped the run, but its ServerApp is still at work")


def test_resume(superlink, begun):
    superlink.status = ["finished:stopped"]
    begun.note_end("by the coordinator", state="stopped")
    code, told, _ = call("resume", begun.path, "--detach")
    assert (code, told) == (0, f"{begun.path}: Flower's run 77 on connection lab\n")
    assert not (begun.path / "ended.json").exists()


def test_resume_on_another_connection_asks_the_old_one_nothing(superlink, begun):
    assert call("resume", begun.path, "--connection", "new", "--detach")[0] == 0
    assert [words[:3:2] for words in superlink.asked] == [["run", "new"]]


@pytest.mark.parametrize("command", ["status", "watch", "resume", "stop"])
def test_no_run_folder(superlink, tmp_path, command):
    code, _, why = call(command, tmp_path / "nowhere")
    assert (code, why) == (1, f"{tmp_path}/nowhere/run.toml: no such file, expected a TOML description")


@pytest.mark.parametrize(
    ("command", "prepare", "why"),
    [
        ("stop", finish, "has finished, there is nothing to stop"),
        (
            "stop",
            lambda run: run.note_end("no", can_heal=False),
            "is not running; Flower: finished:completed: no? heart",
        ),
        ("stop", lambda run: (run.path / "flower.json").unlink(), "end the process that runs it"),
        ("resume", finish, "has finished, expected a run that has not"),
        ("resume", lambda run: (run.path / "flower.json").unlink(), "name a --connection"),
        ("watch", lambda run: (run.path / "flower.json").write_text("{"), "expected the run-id and the connection"),
        ("watch", lambda run: (run.path / "flower.json").write_text('{"run-id": "--x"}'), "expected the run-id"),
        ("status", lambda run: (run.path / "rounds.jsonl").write_text("x\n"), "expected one JSON object"),
        ("status", lambda run: (run.path / "ended.json").write_text("["), "not valid JSON"),
        ("watch", lambda run: (run.path / "sites.json").write_text("[]"), "expected a JSON object"),
    ],
)
def test_what_cannot_be_is_one_line(superlink, begun, command, prepare, why):
    prepare(begun)
    code, _, told = call(command, begun.path)
    assert code == 1
    assert why in told
    assert "\n" not in told


def test_a_run_at_work_is_not_resumed(superlink, begun):
    with locked(begun.path / ".lock", wait_s=0.0):
        assert "is running, expected a run that has ended" in call("resume", begun.path)[2]
    superlink.status = ["starting"]
    assert "Flower's run 77 is starting; stop it first" in call("resume", begun.path)[2]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--connection", "lab", "--set", "train.round=3"], r"train\.round: unknown key, did you mean train\.rounds\?"),
        (["--connection", "lab", "--set", "train.rounds"], "expected key=value"),
        (
            ["--connection", "lab", "--out", "EXPERIMENT/x"],
            r"cannot be made a run folder \(NotADirectoryError: Not a directory\)",
        ),
    ],
)
def test_start_refuses_bad_words(superlink, experiment, words, why):
    code, _, told = call("start", experiment, *(word.replace("EXPERIMENT", str(experiment)) for word in words))
    assert code == 1
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(told)
    assert superlink.asked == []


def test_start_does_not_write_over_a_run(superlink, experiment, begun):
    told = call("start", experiment, "--connection", "lab", "--out", begun.path)[2]
    assert told == f"{begun.path}: holds a run already; resume it or choose another folder"


def test_an_error_is_one_line_and_status_1_from_the_shell(tmp_path):
    words = [sys.executable, "-m", "server", "status", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{tmp_path}/run.toml: no such file, expected a TOML description\n"


def test_export_is_the_librarys(begun, tmp_path):
    code, _, why = call("export", begun.path, "--to", "safetensors", "--out", tmp_path / "out")
    assert (code, why) == (1, f"{begun.path}: found no model/, expected the folder of a finished run")
    assert not (tmp_path / "out").exists()


def test_clean_removes_the_checkpoints_of_finished_runs_alone(begun, tmp_path, make_run):
    done = RunFolder.create(tmp_path / "done", make_run())
    done.save_state(ServerState("run-2", 2, {}))
    finish(done)
    code, told, _ = call("clean", begun.path, done.path, "--yes")
    assert code == 0
    assert f"{begun.path}: interrupted, stays" in told
    assert "removed 1 files" in told
    assert begun.latest_state().round_number == 1
    assert done.latest_state() is None
    assert {path.name for path in (done.path / "checkpoint").iterdir()} == {"run.toml"}
    assert (done.path / "model" / "metadata.json").exists()
    assert call("clean", done.path)[1].endswith("nothing to remove\n")


def test_a_clean_that_is_not_agreed_to_removes_nothing(begun):
    finish(begun)
    done = CliRunner().invoke(app, ["clean", str(begun.path)], input="n\n")
    assert done.exit_code == 1
    assert begun.latest_state().round_number == 1


def test_the_hash_of_a_description_that_does_not_hold_is_one_line(tmp_path):
    (tmp_path / "experiment.toml").write_text("name = 1\n")
    assert call("hash", tmp_path / "experiment.toml")[0] == 1
