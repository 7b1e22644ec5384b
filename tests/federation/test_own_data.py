"""From own files to a model: crops of organs, pictures, one pooled folder. Volumes: tests/docs/test_notebooks.py."""

import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from panfm.cli import main
from panfm.config import load_run
from panfm.evaluate.embed import read_features
from panfm.report.report_data import read_report_data
from simulations.__main__ import app as simulations

REAL = os.environ.get("PANFM_REAL_DATA", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REAL, reason="PANFM_REAL_DATA is not set: no real images"),
]
DESCRIPTION = """
name = "own"
[streams]
hippocampus-mr = {{ spacing-mm = [2.0, 2.0, 2.0], shape = [20, 28, 20], patch = [10, 14, 10] }}
[model]
size = "nano"
[train]
rounds = 1
local-steps = 2
batch-size = 8
[probe]
bootstrap = 20
[cohort]
kind = "folder"
path = "{folder}"
"""


def tool(app, *words):
    """A command as it is typed; what it printed."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, f"{words}: {result.output}"
    return result.output


def copy(files, folder):
    folder.mkdir(parents=True)
    for file in files:
        shutil.copy(file, folder)
    return folder


def plan_and_check(folder, names):
    """The second and third command: a description from the headers of all images, and the check of all sites."""
    sites, run = [folder / "sites" / name for name in names], folder / "run.toml"
    tool(main, "plan", *sites, "--out", run, "--minutes", "0.1")
    tool(main, "site", "check", *sites, "--run", run)
    return run


def run_and_embed(folder, run, outside, *changes):
    """The last two commands: the run's folder, and the features of a site that no round saw."""
    changed = [word for change in ("train.rounds=1", *changes) for word in ("--set", change)]
    tool(simulations, "run", run, "--out", folder / "run", *changed)
    assert (folder / "run" / "report.html").stat().st_size > 0
    tool(main, "embed", folder / "run" / "model", outside, "--out", folder / "outside.npz")
    return read_features(folder / "outside.npz")


def test_three_folders_of_single_organ_crops(tmp_path):
    organs = {"abdomen": ("liver", "spleen"), "renal": ("kidney", "pancreas"), "chest": ("heart", "adipose")}
    for name, parts in organs.items():
        images = tmp_path / "files" / name
        for organ in parts:
            shutil.copytree(Path(REAL, "organs3d", organ), images / organ)
        site = tmp_path / "sites" / name
        shown = tool(main, "site", "init", site, "--from", images, "--split", "train", "--yes")
        assert all(f"{organ}-ct: e.g. subject 'TS-ct" in shown for organ in parts)
        lines = (site / "site.toml").read_text().replace("smallest-batch = 8", "smallest-batch = 1")
        (site / "site.toml").write_text(lines.replace("smallest-steps = 5", "smallest-steps = 1"))
    run = plan_and_check(tmp_path, organs)
    assert set(load_run(run).streams) >= {f"{organ}-ct" for parts in organs.values() for organ in parts}
    site = tmp_path / "outside"
    tool(
        main,
        "site",
        "init",
        site,
        "--from",
        Path(REAL, "organs3d", "brain"),
        "--stream",
        "liver-ct=*ctatlas_CT*",
        "--yes",
    )
    assert run_and_embed(tmp_path, run, site, "train.local-steps=1").subjects == ("TS_ctatlas",)


def test_three_folders_of_pictures(tmp_path):
    for modality in ("ct", "xray", "ultrasound"):
        images = Path(REAL, "modality2d", "train", modality)
        files = copy(sorted(images.iterdir())[:16], tmp_path / "files" / modality)
        site = tmp_path / "sites" / modality
        tool(main, "site", "init", site, "--from", files, "--stream", f"body-{modality}=*", "--split", "train", "--yes")
    run = plan_and_check(tmp_path, ("ct", "xray", "ultrasound"))
    outside = copy(sorted(Path(REAL, "modality2d", "test", "xray").iterdir())[:3], tmp_path / "files" / "outside")
    tool(main, "site", "init", tmp_path / "outside", "--from", outside, "--stream", "body-xray=*", "--yes")
    assert len(run_and_embed(tmp_path, run, tmp_path / "outside", "train.local-steps=5").subjects) == 3


def test_one_pooled_folder_is_split_and_simulated(tmp_path):
    volumes = sorted(Path(REAL, "hippocampus", "images").glob("*.nii.gz"))[:40]
    files = copy(volumes, tmp_path / "files")
    tool(main, "site", "init", tmp_path / "pooled", "--from", files, "--stream", "hippocampus-mr=*", "--yes")
    words = ["--sites", 3, "--by", "size", "--alpha", 5]
    shown = tool(main, "split", tmp_path / "pooled", "--out", tmp_path / "cohort", *words, "--holdout", 0.2)
    assert "site-3" in shown
    run = tmp_path / "run.toml"
    run.write_text(DESCRIPTION.format(folder=tmp_path / "cohort"))
    table = run_and_embed(tmp_path, run, tmp_path / "pooled")
    assert len(table.subjects) == 40
    shown = read_report_data(tmp_path / "run")  # the hold-out has no labels: it is shown, and not probed
    assert shown.examples.rows[0].stream == "hippocampus-mr"
    assert shown.embedding.sites.count("held out") == 8
    assert not (tmp_path / "run" / "probe.json").exists()
