"""`python -m simulations run` in this process."""

import hashlib
import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from panfm.cli import main as panfm
from panfm.config import dump_toml
from panfm.errors import ConfigError, DataError, RunError
from panfm.outputs import read_json_lines
from panfm.report.report_page import render
from panfm.report.run_files import read_run
from panfm.sharing.messages import Invitation
from panfm.site import Site
from server.console import screen
from server.coordinator import app as coordinator
from server.run_folder import RunFolder
from server.tracking import refresh_page
from simulations.__main__ import app
from simulations.cohorts import phantom, real_images
from simulations.cohorts.phantom import PhantomCohort
from simulations.cohorts.prepare import cohort_folder, load_simulation, prepare_cohort, with_cohort
from simulations.cohorts.real_images import RealImagesCohort
from simulations.engines.offline import go_offline
from simulations.extension import extend
from simulations.simulate import simulate


@pytest.fixture
def experiment(federation, monkeypatch) -> Path:
    """A run over the small hospitals as an existing cohort folder; probes are tried elsewhere."""
    monkeypatch.setattr("simulations.simulate.finish", lambda *_, **__: None)
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
    made = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run", *(tmp_path / "run").rglob("*"))}
    assert made == {0o600, 0o700}  # private states of the sites among them


def test_the_hash_of_an_experiment_is_the_same_wherever_it_stands(experiment, federation, tmp_path):
    run, sent = tmp_path / "run", tmp_path / "sent.toml"
    simulate(experiment, ["train.rounds=1"], out=run)
    words = ["hash", experiment, "--set", "train.rounds=1", "--out", sent]
    told = CliRunner().invoke(coordinator, [str(word) for word in words])
    [name] = told.stdout.split()
    assert hashlib.sha256(sent.read_bytes()).hexdigest() == name
    assert json.loads((run / "model" / "metadata.json").read_text())["experiment"] == name
    refresh_page(run)
    assert name in (run / "status.html").read_text()
    assert name in render(read_run(run))
    screens = io.StringIO()
    Console(file=screens, width=200).print(screen(read_run(run)))
    assert f"experiment {name}" in screens.getvalue()
    alpha = federation.sites / "alpha"
    for description in (sent, run / "run.toml"):
        tried = CliRunner().invoke(panfm, ["site", "dry-run", str(alpha), "--run", str(description)])
        assert tried.output.startswith(f"experiment {name}: not approved yet")
    assert Site(alpha).handshake(Invitation(sent.read_text())).experiment == name


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["run", "EXPERIMENT", "--engine", "spark"], "expected one of local, ray, flower"),
        (["run", "EXPERIMENT", "--set", "train.round=3"], r"did you mean train\.rounds"),
        (["run", "EXPERIMENT", "--resume", "nowhere"], r"nowhere/run\.toml: no such file"),
        (["run", "EXPERIMENT", "--resume", "x", "--out", "y"], "--out does not go with --resume"),
        (["run", "EXPERIMENT", "--set", "cohort.path=nowhere"], "nowhere/sites: holds no site"),
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


def test_a_cohort_that_is_not_there_leaves_no_run_folder(experiment, tmp_path):
    with pytest.raises(ConfigError, match="nowhere/sites: holds no site"):
        simulate(experiment, ["cohort.path=nowhere"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_inside_a_file(experiment, tmp_path):
    with pytest.raises(
        RunError, match=r"experiment\.toml/x: cannot be made a run folder \(NotADirectoryError: Not a directory\)"
    ):
        simulate(experiment, out=experiment / "x")


def test_overrides_do_not_go_with_resume(experiment, tmp_path):
    simulate(experiment, ["train.rounds=1"], out=tmp_path / "run")
    with pytest.raises(ConfigError, match="--set does not go with --resume"):
        simulate(experiment, ["train.rounds=2"], resume=tmp_path / "run")


def test_an_edited_description_is_refused(experiment, tmp_path):
    """That of the run folder, and the one that the run was started with; `--set` of its start stays."""
    simulate(experiment, ["train.rounds=1"], out=tmp_path / "run")
    experiment.write_text(experiment.read_text().replace("seed = 3", "seed = 4"))
    with pytest.raises(
        ConfigError, match=r"experiment\.toml: differs from the run that began: seed: found 4, expected 3;"
    ):
        simulate(experiment, resume=tmp_path / "run")
    path = tmp_path / "run" / "run.toml"
    path.write_text(path.read_text().replace("rounds = 1", "rounds = 7"))
    done = call("run", "--resume", tmp_path / "run")
    assert done.exit_code == 1
    assert str(done.exception) == (
        f"{path}: differs from the run that began: train.rounds: found 7, expected 1; "
        "start a new run, or go on with more rounds by --extend rounds=N"
    )


@pytest.mark.slow
def test_a_run_with_constants_from_sums_is_resumed_under_its_description(experiment, federation, tmp_path):
    """The description that the user has lacks the numbers that the run has filled in."""
    for folder in sorted(federation.sites.iterdir()):
        table = (folder / "site.toml").read_text()
        (folder / "site.toml").write_text(f'{table}may-leave = ["updates", "counts", "input-sums"]\n')
    text = experiment.read_text().replace("[streams.heart-mr]", '[streams.heart-mr]\ninput-constants = "summed"')
    experiment.write_text(text)
    assert simulate(experiment, out=tmp_path / "run") == tmp_path / "run"
    numbers = RunFolder.resume(tmp_path / "run").run.streams["heart-mr"].input_centre
    assert len(numbers) == 3
    assert simulate(experiment, resume=tmp_path / "run") == tmp_path / "run"
    experiment.write_text(text.replace("rounds = 2", "rounds = 3"))
    with pytest.raises(ConfigError, match=r"differs from the run that began: train\.rounds"):
        simulate(experiment, resume=tmp_path / "run")


@pytest.mark.slow
def test_a_finished_run_is_extended(experiment, tmp_path):
    """It goes on from its model and its sites' private states, and can be resumed as it is described from then on."""
    folder = simulate(experiment, ["train.rounds=1"], out=tmp_path / "run")
    first = read_json_lines(folder / "rounds.jsonl")
    done = call("run", "--resume", folder, "--extend", "rounds=3")
    assert done.exit_code == 0, done.exception
    rounds = read_json_lines(folder / "rounds.jsonl")
    assert [line["round"] for line in rounds] == [1, 2, 3]
    assert rounds[:1] == first
    assert json.loads((folder / "model" / "metadata.json").read_text())["rounds"] == 3
    model = (folder / "model" / "model.safetensors").read_bytes()
    simulate(experiment, resume=folder)
    assert (folder / "model" / "model.safetensors").read_bytes() == model


@pytest.mark.slow
def test_what_cannot_be_extended_is_one_line(experiment, tmp_path):
    folder = simulate(experiment, ["train.rounds=1", "train.local-steps=1"], out=tmp_path / "run")
    for words, why in {
        (): "expected a run description",
        ("--extend", "rounds=3"): "--extend: goes with --resume RUN",
        ("--resume", folder, "--extend", "seed=4"): "--extend 'seed=4': expected rounds=N",
        ("--resume", folder, "--extend", "rounds=1"): "--extend rounds=1: the run has 1 rounds already, expected more",
        ("--resume", folder, "--extend", "rounds=2000000"): "train.rounds: found 2000000, expected a number",
    }.items():
        done = call("run", *words)
        assert done.exit_code == 1
        assert isinstance(done.exception, ConfigError)
        assert why in str(done.exception)


def test_an_unfinished_run_is_not_extended(experiment, tmp_path):
    folder = RunFolder.create(tmp_path / "run", load_simulation(experiment))
    with pytest.raises(ConfigError, match="0 of 2 rounds are done; finish them first, without --extend"):
        extend(folder, 5)


def test_the_owner_of_the_data_is_told_a_sites_error(experiment, federation, tmp_path, monkeypatch):
    path = federation.sites / "beta" / "beta-0-heart.nii.gz"
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=f"^{path}: found no NIfTI header"):
        simulate(experiment, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("simulations.simulate.check_cohort", lambda *_: None)  # as where a file breaks in a run
    with pytest.raises(RunError) as caught:
        simulate(experiment, out=tmp_path / "run")
    told, own = str(caught.value).splitlines()
    assert told.endswith("site beta: DataError: this site's data or private state is faulty; its log tells more")
    assert own.startswith(f"site beta: DataError: {federation.sites}/beta/beta-0-heart.nii.gz: found ")


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

    monkeypatch.chdir(tmp_path)
    cohort = '[cohort]\nkind = "phantom"\nholdout-subjects = 1\nsites = { a = { organs = ["brain"], subjects = 2 } }\n'
    stream = "brain-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }"
    (tmp_path / "x.toml").write_text(f'name = "x"\n{cohort}[streams]\n{stream}\n')
    first = prepare_cohort(load_simulation(tmp_path / "x.toml"), Console())
    assert (first / "sites" / "a" / "site.toml").exists()
    assert "made before" not in capsys.readouterr().out
    assert prepare_cohort(load_simulation(tmp_path / "x.toml"), Console()) == first
    assert "made before" in capsys.readouterr().out
    assert prepare_cohort(load_simulation(tmp_path / "x.toml", ["cohort.seed=1"]), Console()) != first


@pytest.fixture
def scans(tmp_path, monkeypatch) -> Path:
    """A folder that looks like real scans, from outside."""
    folder = tmp_path / "scans"
    (folder / "hippocampus" / "images").mkdir(parents=True)
    (folder / "hippocampus" / "images" / "hippocampus_001.nii.gz").write_bytes(b"one")
    monkeypatch.setenv("PANFM_REAL_DATA", str(folder))
    return folder


def test_a_cohorts_name_follows_from_what_it_is_made_of(federation, scans, monkeypatch):
    run = federation.describe()
    sites = {"a": {"organs": ["brain"], "subjects": 2}}
    drawn = with_cohort(run, PhantomCohort(kind="phantom", sites=sites))
    real = with_cohort(run, RealImagesCohort(kind="real-images"))
    names = [(cohort_folder(drawn), cohort_folder(real))]

    def changes(phantoms: bool, reals: bool) -> None:
        names.append((cohort_folder(drawn), cohort_folder(real)))
        assert [before != after for before, after in zip(*names[-2:], strict=True)] == [phantoms, reals]

    changes(phantoms=False, reals=False)
    (scans / "hippocampus" / "images" / "hippocampus_002.nii.gz").write_bytes(b"two")
    changes(phantoms=False, reals=True)
    (scans / "hippocampus" / "images" / "hippocampus_002.nii.gz").write_bytes(b"more")
    changes(phantoms=False, reals=True)
    os.utime(scans / "hippocampus" / "images" / "hippocampus_002.nii.gz", ns=(0, 0))
    changes(phantoms=False, reals=True)
    monkeypatch.setattr(real_images, "__file__", __file__)
    changes(phantoms=False, reals=True)
    monkeypatch.setattr(phantom, "__file__", __file__)
    changes(phantoms=True, reals=False)
    monkeypatch.delenv("PANFM_REAL_DATA")
    assert cohort_folder(drawn) == names[-1][0]
    with pytest.raises(ConfigError, match="PANFM_REAL_DATA is not set"):
        cohort_folder(real)


def test_a_line_that_is_being_written_is_left_for_later(tmp_path):
    path = tmp_path / "rounds.jsonl"
    assert read_json_lines(path) == []
    path.write_text('{"round": 1}\n{"rou')
    assert read_json_lines(path) == [{"round": 1}]
    path.write_text('{"round": 1}\n{"round": 2}')
    assert read_json_lines(path) == [{"round": 1}]
    path.write_text('{"round": 1}\n{"round": 2}\n')
    assert read_json_lines(path) == [{"round": 1}, {"round": 2}]


def test_flower_has_a_home_of_its_own(monkeypatch):
    from flwr.supercore.utils import get_flwr_home

    for _ in range(2):  # nobody else's, and no earlier one's of this process
        monkeypatch.delenv("FLWR_HOME", raising=False)
        go_offline()
        assert get_flwr_home() != Path.home() / ".flwr"
        assert not get_flwr_home().exists()
        get_flwr_home().mkdir()
    monkeypatch.delenv("FLWR_HOME", raising=False)
    go_offline()
    assert not get_flwr_home().exists()
    monkeypatch.setenv("FLWR_HOME", "/chosen")
    go_offline()
    assert get_flwr_home() == Path("/chosen")
