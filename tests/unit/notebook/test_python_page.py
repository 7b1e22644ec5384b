"""The examples of docs/python.md, and of the docstrings, run as they stand."""

import doctest
import json
import re
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from panfm.config import dump_toml
from panfm.evaluate.result import ProbeResult, Score, write_result
from panfm.notebook import loaded_model, run_tables
from panfm.registry import MASKING_POLICIES
from tests.unit.report.test_status import line

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def workplace(tmp_path, make_run, write_run, write_site, monkeypatch):
    """A folder with the run, the scans and the site that the examples name."""
    run = tmp_path / "runs" / "demo"
    run.parent.mkdir()
    write_run(make_run()).rename(run)
    (run / "run.toml").write_text(dump_toml(make_run()))
    (run / "rounds.jsonl").write_text("".join(json.dumps(line(number)) + "\n" for number in (1, 2)))
    write_result(run / "probe.json", ProbeResult((Score("federated", "all", "auc", 0.7, 0.6, 0.8, 3),), {}, {}, {}))
    scans, random = tmp_path / "scans", np.random.default_rng(0)
    scans.mkdir()
    for name in ("a", "b"):
        voxels = random.uniform(0, 1000, size=(8, 9, 10)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0])), scans / f"{name}-t1.nii.gz")
    Image.fromarray(random.integers(0, 255, (10, 12, 3), dtype=np.uint8)).save(scans / "b-eye.png")
    write_site(tmp_path / "sites" / "clinic", "clinic", ("brain",))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MASKING_POLICIES, "_targets", dict(MASKING_POLICIES._targets))


FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def test_the_page(workplace):
    done = doctest.testfile(str(ROOT / "docs" / "python.md"), module_relative=False, optionflags=FLAGS)
    assert done.attempted > 15
    assert done.failed == 0


def test_the_readme(workplace):
    """With the run, the stream and the scans that are there."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 8
    for named, there in {
        "runs/own": "runs/demo",
        "brain-mr.t1": "brain-mr",
        "new/": "scans/",
        ".nii.gz": "-t1.nii.gz",
    }.items():
        assert named in code
        code = code.replace(named, there)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["features"].shape == (2, 48)
    assert names["logits"].shape == (1, 2)


@pytest.mark.parametrize("module", [loaded_model, run_tables])
def test_the_docstrings(workplace, module):
    done = doctest.testmod(module, optionflags=FLAGS)
    assert done.attempted
    assert done.failed == 0
