"""A whole run over two hospitals with T1 and FLAIR, one of them with two visits of its patients."""

import json

import numpy as np
import pytest
import safetensors.numpy
from typer.testing import CliRunner

from panfm.cli import main
from panfm.config import load_run
from panfm.evaluate.embed import read_features
from server.run_folder import RunFolder
from simulations.engines.job import Job
from simulations.engines.local import run as run_local

RUN = """
name = "contrasts"
[streams]
"brain-mr.t1" = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }
"brain-mr.flair" = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }
[train]
rounds = 1
local-steps = 2
batch-size = 3
"""


@pytest.mark.slow
def test_contrasts_and_sessions_train_and_embed(tmp_path, write_site):
    write_site(tmp_path / "sites" / "one", "one", ("brain", "head"), 4)
    rename(tmp_path / "sites" / "one", ("brain-mr.t1", "brain-mr.flair"))
    write_site(tmp_path / "sites" / "two", "two", ("brain", "head"), 4)
    rename(tmp_path / "sites" / "two", ("brain-mr.t1", "brain-mr.t1"))
    (tmp_path / "run.toml").write_text(RUN)
    RunFolder.create(tmp_path / "run", load_run(tmp_path / "run.toml"))
    run_local(Job(tmp_path / "sites", tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert lines[-1]["coverage"] == {"brain-mr.t1": ["one", "two"], "brain-mr.flair": ["one"]}
    assert set(lines[-1]["bytes_up"]) == {"backbone", "head", "stream:brain-mr.t1", "stream:brain-mr.flair"}
    assert json.loads((tmp_path / "run" / "sites.json").read_text())["coverage"]["brain-mr.t1"] == {"one": 3, "two": 3}
    names = safetensors.numpy.load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {"streams.brain-mr_t1.embedding", "heads.streams.brain-mr_flair.hidden_query"} <= set(names)
    words = ["embed", tmp_path / "run" / "model", tmp_path / "sites" / "two", "--out", tmp_path / "two.npz"]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert "4 subjects in 8 sessions" in result.output, result.output
    table = read_features(tmp_path / "two.npz")
    assert table.sessions == ("brain", "head") * 4
    assert np.isfinite(table.features).all()


def rename(folder, streams):
    """Give the images of two organs the names of streams; with the same name twice they are sessions."""
    lines = (folder / "manifest.csv").read_text().splitlines()
    rows = ["subject,stream,path,split,session"]
    for line in lines[1:]:
        for organ, stream in zip(("brain", "head"), streams, strict=True):
            if f",{organ}-mr," in line:
                session = organ if streams[0] == streams[1] else ""
                rows.append(f"{line.replace(f'{organ}-mr', stream, 1)},{session}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
