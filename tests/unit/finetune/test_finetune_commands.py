"""`panfm finetune` trains on a tiny site, and reports each mistake in one line."""

import json
import shutil
from functools import partial

import pytest
from typer.testing import CliRunner

import panfm
from panfm.cli import main
from panfm.finetune.finetune_settings import read_settings, write_settings
from tests.cases import quick

invoke = partial(CliRunner().invoke, main)


@pytest.fixture
def words(make_run, write_run, labelled_site, tmp_path):
    run, site = write_run(make_run()), labelled_site()
    return ["finetune", str(run), "--data", str(site), "--task", "labels.csv:bright", "--out", str(tmp_path / "out")]


@pytest.mark.slow
def test_labels_to_a_folder(words, tmp_path):
    done = invoke([*words, "--steps", "4", "--parts", "norms", "--batch-size", "4"])
    assert done.exit_code == 0, done.output
    assert "bright: yes-no; patients: 6 train, 3 validation, 3 test" in done.output
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {(score["arm"], score["metric"]) for score in result["scores"]} >= {("fine-tuned", "auc"), ("knn", "auc")}
    assert panfm.load(tmp_path / "out").task.name == "bright"
    weights = (tmp_path / "out" / "model" / "head.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out" / "model")
    assert invoke(["finetune", "--resume", str(tmp_path / "out")]).exit_code == 0
    assert (tmp_path / "out" / "model" / "head.safetensors").read_bytes() == weights
    again = invoke([*words, "--steps", "4"])
    assert (again.exit_code, "exists already" in again.output) == (1, True)
    ended = invoke(["finetune", "--resume", str(tmp_path / "out")])
    assert (ended.exit_code, "has ended" in ended.output) == (1, True)


@pytest.mark.parametrize(
    ("changes", "told"),
    quick(
        [
            (["--parts", "toes"], "--parts: found 'toes', expected head, all, norms"),
            (["--steps", "0"], "--steps: found 0, expected greater than 0"),
            (["--streams", "leg-mr"], "--streams: found 'leg-mr'"),
            (["--parts", "last-blocks"], "--parts: found 'last-blocks'"),
            (["--parts", "last-blocks:9"], "train.parts.blocks: 9, the model has 2"),
            (["--parts", "lora:2:8:9"], "--parts: found 'lora:2:8:9'"),
            (["--patients", "1"], "--patients: found 1, expected greater than or equal to 2"),
            (["--task", "labels.csv"], "--task: found 'labels.csv', expected labels.csv:COLUMN"),
            (["--pooling", "max"], "--pooling: found 'max'"),
            (["--data", "absent"], "absent/site.toml: no such file"),
            (["--resume", "absent"], "--resume: found RUN, --data, --task or --out beside it"),
        ],
        3,
    ),
)
def test_mistakes_are_told_before_training(words, changes, told, tmp_path):
    done = invoke([*words, *changes])
    assert done.exit_code == 1
    assert told in done.output
    assert len(done.output.strip().splitlines()[-1:]) == 1
    assert not (tmp_path / "out").exists()


def test_a_table_of_the_working_directory_is_found_from_elsewhere(words, tmp_path, monkeypatch):
    site = tmp_path / "clinic"
    (tmp_path / "here").mkdir()
    (site / "labels.csv").rename(tmp_path / "here" / "mine.csv")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("panfm.cli.finetune_commands._train", lambda settings, folder: write_settings(folder, settings))
    assert invoke([*words, "--task", "mine.csv:bright"]).exit_code == 0
    assert read_settings(tmp_path / "out").task == f"{tmp_path / 'here' / 'mine.csv'}:bright"


def test_a_folder_that_cannot_be_made_is_told(words, tmp_path):
    (tmp_path / "file").touch()
    done = invoke([*words, "--out", str(tmp_path / "file" / "out")])
    assert "out: cannot be made (NotADirectoryError: Not a directory)" in done.output.replace("\n", "")


def test_what_is_missing_is_told():
    done = invoke(["finetune", "run"])
    assert "--data: missing, expected: panfm finetune RUN --data SITE --task TASK --out FOLDER" in done.output
    done = invoke(["finetune", "--resume", "absent"])
    assert "absent/finetune.toml: cannot be read" in done.output
