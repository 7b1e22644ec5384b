"""From own files to a model: the commands of docs/own-data.md on three folders of real images."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import panfm
from panfm.cli import main
from panfm.evaluate.embed import read_features
from panfm.report.report_data import read_report_data
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


def test_three_folders_of_hippocampus_volumes_end_with_probes_and_a_report(tmp_path):
    """Five commands, and the same embedding in Python. Volumes 2k - 1 and 2k are one person, which no name tells."""
    volumes = sorted(Path(REAL, "hippocampus", "images").glob("*.nii.gz"))[:62]
    parts = {"north": volumes[:16], "south": volumes[16:32], "east": volumes[32:48], "holdout": volumes[48:]}
    for name, part in parts.items():
        images = copy(part, tmp_path / "files" / name)
        site = tmp_path / ("" if name == "holdout" else "sites") / name
        write_labels(site, part)
        options = ["--split", "test"] if name == "holdout" else []
        shown = tool(
            main, "site", "init", site, "--from", images, "--stream", "brain-mr.t1=hippocampus_*", "--yes", *options
        )
        assert f"{len(part)} rows written" in shown
    sites, holdout, run = sorted((tmp_path / "sites").iterdir()), tmp_path / "holdout", tmp_path / "run.toml"
    told = tool(main, "plan", *sites, "--holdout", holdout, "--out", run, "--minutes", 1)
    assert "brain-mr.t1" in told
    tool(main, "site", "check", *sites, "--holdout", holdout, "--run", run)
    small = ["model.size=nano", "train.rounds=1", "train.local-steps=5", "probe.bootstrap=20"]
    shown = tool(
        main, "simulate", run, "--out", tmp_path / "run", *(word for text in small for word in ("--set", text))
    )
    assert "bright" in shown
    assert (tmp_path / "run" / "report.html").stat().st_size > 0
    data = read_report_data(tmp_path / "run")
    assert [row.stream for row in data.examples.rows] == ["brain-mr.t1"]
    assert set(data.embedding.sites) == {"north", "south", "east", "held out"}
    assert data.cost.cpu_seconds > 0
    written = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert {"federated", "site:north", "site:south", "site:east", "untrained"} <= {
        score["arm"] for score in written["scores"]
    }
    new = [Path(REAL, "hippocampus", "images", volumes[-1].name), Path(REAL, "hippocampus", "images", volumes[-2].name)]
    tool(main, "embed", tmp_path / "run", *new, "--out", tmp_path / "new.npz")
    table = read_features(tmp_path / "new.npz")
    assert len(table.subjects) == 2
    in_a_notebook = panfm.load(tmp_path / "run").embed({"brain-mr.t1": new})
    np.testing.assert_allclose(in_a_notebook, table.features, atol=1e-5)


def write_labels(site, volumes):
    """A label of our own for every volume; `site init` finds the table and names it in site.toml."""
    site.mkdir(parents=True)
    with (site / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["subject", "bright"])
        table.writerows([volume.name.split("_")[1].split(".")[0], number % 2] for number, volume in enumerate(volumes))


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
