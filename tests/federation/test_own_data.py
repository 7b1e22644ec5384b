"""From own files to a model: crops of organs, pictures, one pooled folder. Volumes: tests/docs/test_notebooks.py."""

import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from panfm.cli import main
from panfm.evaluate.embed import read_features
from simulations.__main__ import app as simulations

REAL = os.environ.get("PANFM_REAL_DATA", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REAL, reason="PANFM_REAL_DATA is not set: no real images"),
]
TINY = """
[model]
size = "nano"
[train]
rounds = 1
local-steps = {steps}
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


def write_run(folder, streams, *, steps=5):
    text = f'name = "own"\n[streams]\n{streams}{TINY.format(steps=steps, folder=folder)}'
    (folder / "run.toml").write_text(text)
    return folder / "run.toml"


def run_and_embed(folder, run, outside):
    """The last two commands: the run's folder, and the features of a site that no round saw."""
    tool(simulations, "run", run, "--out", folder / "run")
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
    names = [f"{organ}-ct" for parts in organs.values() for organ in parts] + ["liver-mr"]
    table = "{ spacing-mm = [12.0, 12.0, 12.0], shape = [16, 16, 8], patch = [8, 8, 8] }"
    run = write_run(tmp_path, "".join(f"{name} = {table}\n" for name in names), steps=1)
    for name in organs:
        tool(main, "site", "check", tmp_path / "sites" / name, "--run", run)
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
    assert run_and_embed(tmp_path, run, site).subjects == ("TS_ctatlas",)


def test_three_folders_of_pictures(tmp_path):
    for modality in ("ct", "xray", "ultrasound"):
        images = Path(REAL, "modality2d", "train", modality)
        files = copy(sorted(images.iterdir())[:16], tmp_path / "files" / modality)
        site = tmp_path / "sites" / modality
        tool(main, "site", "init", site, "--from", files, "--stream", f"body-{modality}=*", "--split", "train", "--yes")
    table = "{ shape = [32, 32], patch = [16, 16] }"
    run = write_run(tmp_path, "".join(f"body-{name} = {table}\n" for name in ("ct", "xray", "ultrasound")))
    for modality in ("ct", "xray", "ultrasound"):
        tool(main, "site", "check", tmp_path / "sites" / modality, "--run", run)
    outside = copy(sorted(Path(REAL, "modality2d", "test", "xray").iterdir())[:3], tmp_path / "files" / "outside")
    tool(main, "site", "init", tmp_path / "outside", "--from", outside, "--stream", "body-xray=*", "--yes")
    assert len(run_and_embed(tmp_path, run, tmp_path / "outside").subjects) == 3


def test_one_pooled_folder_is_split_and_simulated(tmp_path):
    volumes = sorted(Path(REAL, "hippocampus", "images").glob("*.nii.gz"))[:40]
    files = copy(volumes, tmp_path / "files")
    tool(main, "site", "init", tmp_path / "pooled", "--from", files, "--stream", "hippocampus-mr=*", "--yes")
    words = ["--sites", 3, "--by", "size", "--alpha", 5]
    shown = tool(main, "split", tmp_path / "pooled", "--out", tmp_path / "cohort", *words, "--holdout", 0)
    assert "site-3" in shown
    stream = "hippocampus-mr = { spacing-mm = [2.0, 2.0, 2.0], shape = [20, 28, 20], patch = [10, 14, 10] }"
    run = write_run(tmp_path / "cohort", stream, steps=2)
    table = run_and_embed(tmp_path / "cohort", run, tmp_path / "pooled")
    assert len(table.subjects) == 40
