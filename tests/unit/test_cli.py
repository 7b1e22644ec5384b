import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from panfm import __version__
from panfm.cli import main
from panfm.config import load_run, load_site
from panfm.models.warm_start import read_start
from server.coordinator import app as server
from simulations.__main__ import app as simulations
from tests.cases import quick
from tests.unit.models.test_public_weights import random_dinov2

ROOT = Path(__file__).parents[2]
RUN = """
name = "run"
[streams]
brain-mr = { shape = [8, 8, 8], patch = [4, 4, 4], spacing-mm = [20.0, 20.0, 20.0] }
[cohort]
kind = "phantom"
holdout-subjects = 2
[cohort.sites]
one = { organs = ["brain"], subjects = 9 }
two = { organs = ["brain"], subjects = 9 }
"""


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


def panfm(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_help_needs_neither_torch_nor_monai():
    code = (
        "import sys, panfm.cli; sys.exit(any(name in sys.modules for name in ('torch', 'monai', 'numpy', 'pydantic')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"site", "ledger"} <= set(panfm("--help").output.split())


def test_error_is_one_line_on_stderr_from_the_shell(tmp_path):
    command = [sys.executable, "-c", "from panfm.cli import main; main()", "site", "check", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == f"{tmp_path}/site.toml: no such file, expected a TOML description\n"
    assert result.stdout == ""


def test_site_init_writes_what_site_check_reads(tmp_path):
    folder = tmp_path / "clinic"
    assert panfm("site", "init", folder, "--name", "clinic").exit_code == 0
    assert load_site(folder).name == "clinic"
    assert folder.stat().st_mode & 0o077 == 0
    result = panfm("site", "check", folder)
    assert result.exit_code == 1
    assert "manifest.csv: found no rows, expected one row per subject and stream" in result.output


def test_site_init_asks(tmp_path):
    folder = tmp_path / "clinic"
    result = CliRunner().invoke(main, ["site", "init", str(folder)], input="clinic\n")
    assert (result.exit_code, load_site(folder).name) == (0, "clinic")


def test_site_init_overwrites_nothing(tmp_path):
    (tmp_path / "manifest.csv").write_text("mine")
    result = panfm("site", "init", tmp_path, "--name", "clinic")
    assert result.exit_code == 1
    assert result.stderr == f"{tmp_path}/manifest.csv: found a file, expected none: it would be overwritten\n"
    assert not (tmp_path / "site.toml").exists()


@pytest.mark.parametrize("name", ["", "A", "a b", 'x"\nname="y', "a" * 65])
def test_site_init_refuses_a_bad_name(tmp_path, name):
    result = panfm("site", "init", tmp_path / "new", "--name", name)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("--name: name: ")
    assert not (tmp_path / "new").exists()


def test_site_init_into_a_file(run_file):
    result = panfm("site", "init", run_file / "x", "--name", "clinic")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    quick(
        [
            "-m simulations run RUN",
            "-m server start RUN --connection none",
            "-m panfm site check . --run RUN",
            "-m panfm site dry-run . --run RUN",
            "-m panfm ledger plan RUN",
            "-m panfm audit step RUN",
            "-m simulations cohort make new --run RUN",
        ],
        2,
    ),
)
def test_a_mistake_in_a_run_description_is_told_before_torch_is_imported(tmp_path, words):
    description = tmp_path / "run.toml"
    description.write_text('name = "x"\nstreamz = 1\n')
    code = f"""
import runpy, sys
sys.argv = {words.split()[1:]!r}
sys.argv = [word.replace("RUN", {str(description)!r}) for word in sys.argv]
try:
    runpy.run_module(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 1, end.code
assert not {{"torch", "monai", "flwr.serverapp"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "did you mean streams" in done.stderr


@pytest.mark.parametrize("command", ["ledger verify", "site log"])
@pytest.mark.parametrize("noted", ["abc", "g" * 64, "0" * 63])
def test_a_slip_in_a_noted_end_is_not_called_tampering(tmp_path, command, noted):
    folder = tmp_path / "clinic"
    panfm("site", "init", folder, "--name", "clinic")
    result = panfm(*command.split(), folder, "--noted", noted)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"--noted '{noted}': expected the 64 characters 0-9 and a-f")


def test_weights_show_prints_a_description_that_fits(tmp_path):
    torch.save(random_dinov2(), tmp_path / "w.pth")
    shown = panfm("weights", "show", tmp_path / "w.pth").output
    assert "# dinov2: 48 wide, 2 blocks, 3 channels, positions learned on 4 x 4 patches" in shown
    text = f'name = "shown"\norgans = ["eye"]\n{shown}'.replace("streams.<name>", "streams.eye-fundus")
    text = text.replace("patch = [8, 8]", "shape = [32, 32]\npatch = [8, 8]")
    (tmp_path / "run.toml").write_text(text)
    read_start(load_run(tmp_path / "run.toml"))
    plain = {name: value for name, value in random_dinov2().items() if ".ls" not in name}
    torch.save(plain, tmp_path / "w.pth")
    assert 'normalisation = "imagenet"' in panfm("weights", "show", tmp_path / "w.pth").output
    assert panfm("weights", "show", tmp_path / "none.pth").output == (
        f"start.model: {tmp_path}/none.pth cannot be read (No such file or directory)\n"
    )


def test_weights_fetch_without_a_network_is_one_line(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def nowhere(*_, **__):
        raise hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(hub, "snapshot_download", nowhere)
    result = panfm("weights", "fetch", "facebook/dinov2-small", "--out", tmp_path / "new")
    assert (result.exit_code, result.output) == (
        1,
        "facebook/dinov2-small: huggingface.co cannot be reached; copy config.json, preprocessor_config.json, "
        "model.safetensors into a folder\n",
    )
    assert panfm("weights", "fetch", "a/b", "--out", tmp_path).output == f"{tmp_path}: exists, expected a new folder\n"


def test_simulate_without_its_package_is_one_line(monkeypatch):
    """`panfm simulate` where the package `simulations` is not installed, as at a hospital."""

    def absent(name):
        if name.startswith("simulations"):
            raise ModuleNotFoundError("No module named 'simulations'", name="simulations")
        return importlib.import_module(name)

    monkeypatch.setattr("panfm.cli.import_module", absent)
    result = panfm("simulate", "run.toml", "--out", "x")
    expected = "simulate: not installed, expected: pip install 'panfm[simulation]' panfm-simulation\n"
    assert (result.exit_code, result.stderr) == (1, expected)
    assert "simulate" in panfm("--help").output


@pytest.mark.parametrize("app", [main, server, simulations])
def test_every_tool_tells_its_version(app):
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"panfm {__version__}\n")
