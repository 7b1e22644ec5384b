import json

import numpy as np
import pytest

from panfm.errors import ConfigError, RunError
from server.app import open_folder
from server.checkpoint import ServerState
from server.run_folder import RunFolder

STATE = ServerState("run-1", 2, {"backbone": np.zeros(1, np.float32)})


def test_rounds_after_the_last_checkpoint_are_dropped_on_resume(tmp_path, make_run):
    folder = RunFolder.create(tmp_path, make_run())
    for number in (1, 2, 3):
        folder.append_round({"round": number, "loss": float("nan"), "nested": [{"x": float("inf")}]})
    folder.save_state(STATE)
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"round": 1')
    back = RunFolder.resume(tmp_path)
    assert back.run == make_run()
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert lines == [{"round": number, "loss": None, "nested": [{"x": None}]} for number in (1, 2)]


def test_a_run_is_not_started_over_another(tmp_path, make_run):
    folder = RunFolder.create(tmp_path, make_run())
    RunFolder.create(tmp_path, make_run())
    folder.save_state(STATE)
    with pytest.raises(RunError, match="holds a run already"):
        RunFolder.create(tmp_path, make_run())


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.toml: no such file"):
        RunFolder.resume(tmp_path)


def test_run_config_to_folder(tmp_path):
    words = {"experiment": "configs/experiments/quickstart.toml", "overrides": "train.rounds=2; seed=5 ;"}
    folder = open_folder(words | {"run-dir": str(tmp_path / "run")})
    assert (folder.run.train.rounds, folder.run.seed, folder.path) == (2, 5, tmp_path / "run")
    assert open_folder({"resume": str(tmp_path / "run")}).run == folder.run
    with pytest.raises(ConfigError, match="experiment is missing"):
        open_folder({})
    with pytest.raises(ConfigError, match=r"train\.round: unknown key, did you mean train\.rounds"):
        open_folder(words | {"overrides": "train.round=2"})
