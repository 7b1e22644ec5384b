"""`python -m simulations run` in this process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from panfm.config import dump_toml
from panfm.errors import ConfigError, RunError
from simulations.__main__ import app
from simulations.run import prepare_cohort, simulate


@pytest.fixture
def experiment(federation, monkeypatch) -> Path:
    """A run over the small hospitals as an existing cohort folder; probes are tried elsewhere."""
    monkeypatch.setattr("simulations.run.finish", lambda *_: None)
    monkeypatch.chdir(federation.folder)
    path = federation.folder / "experiment.toml"
    path.write_text(dump_toml(federation.describe("train.rounds=2")) + '\n[cohort]\nkind = "folder"\npath = "."\n')
    return path


def call(*words: str):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)


def test_run_and_resume(experiment, tmp_path):
    done = call("run", experiment, "--out", tmp_path / "run", "--set", "train.local-steps=1", "--set", "seed=9")
    assert done.exit_code == 0, done.output
    assert "round 2/2" in done.output
    assert "alpha: 5 subjects: brain-mr 5, heart-mr 5" in done.output
    model = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    with pytest.raises(RunError, match="holds a run already"):
        simulate(experiment, out=tmp_path / "run")
    assert simulate(experiment, resume=tmp_path / "run") == tmp_path / "run"
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == model
    assert len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "run" / "model" / "metadata.json").read_text())["rounds"] == 2


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["run", "EXPERIMENT", "--engine", "spark"], "expected one of local, ray, flower"),
        (["run", "EXPERIMENT", "--set", "train.round=3"], r"did you mean train\.rounds"),
        (["run", "EXPERIMENT", "--resume", "nowhere"], r"nowhere/run\.toml: no such file"),
        (["run", "absent.toml"], r"absent\.toml: no such file"),
        (["bench", "no-such-bench"], "unknown, expected one of .*round-overhead"),
        (["study", "no-such-study"], "unknown, expected one of"),
    ],
)
def test_bad_words(experiment, words, why):
    done = call(*[experiment if word == "EXPERIMENT" else word for word in words])
    assert done.exit_code == 1
    with pytest.raises(ConfigError, match=why):
        raise done.exception


def test_overrides_do_not_go_with_resume(experiment, tmp_path):
    simulate(experiment, ["train.rounds=1"], out=tmp_path / "run")
    with pytest.raises(ConfigError, match="--set does not go with --resume"):
        simulate(experiment, ["train.rounds=2"], resume=tmp_path / "run")


def test_a_run_without_a_cohort_cannot_be_simulated(federation):
    with pytest.raises(ConfigError, match="cohort is missing"):
        prepare_cohort(federation.describe(), console=None)


def test_an_error_is_one_line_and_status_1():
    root = Path(__file__).resolve().parents[2]
    words = [sys.executable, "-m", "simulations", "run", "absent.toml"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == "absent.toml: no such file, expected a TOML description"


def test_a_phantom_cohort_is_made_once(federation, tmp_path, monkeypatch, capsys):
    from rich.console import Console

    from panfm.config import load_run

    monkeypatch.chdir(tmp_path)
    cohort = '[cohort]\nkind = "phantom"\nholdout-subjects = 1\nsites = { a = { organs = ["brain"], subjects = 2 } }\n'
    stream = "brain-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }"
    (tmp_path / "x.toml").write_text(f'name = "x"\n{cohort}[streams]\n{stream}\n')
    first = prepare_cohort(load_run(tmp_path / "x.toml"), Console())
    assert (first / "sites" / "a" / "site.toml").exists()
    assert "made before" not in capsys.readouterr().out
    assert prepare_cohort(load_run(tmp_path / "x.toml"), Console()) == first
    assert "made before" in capsys.readouterr().out
    assert prepare_cohort(load_run(tmp_path / "x.toml", ["cohort.seed=1"]), Console()) != first
