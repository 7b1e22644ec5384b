"""Notebooks of examples/: kept without outputs, and run to their end on real images."""

import json
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest

import panfm
from panfm.evaluate.embed import read_features
from panfm.report.report_data import read_report_data
from tests.docs.executed_page import replaced, run_notebook

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
REAL = os.environ.get("PANFM_REAL_DATA", "")
needs_images = pytest.mark.skipif(not REAL, reason="PANFM_REAL_DATA is not set: no real images")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_what_a_machine_adds(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec"}
    assert dict(notebook.metadata.kernelspec) == {"display_name": "Python 3", "language": "python", "name": "python3"}
    for number, cell in enumerate(notebook.cells):
        assert cell.id == f"cell-{number}"
        assert set(cell.metadata) <= {"tests"}
        replaced(cell.source, cell.metadata.get("tests", {}))
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_to_files(path: Path) -> None:
    texts = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    links = [link for text in texts for link in re.findall(r"\]\((?!https?:)([^)#]+)", text)]
    assert links
    assert [link for link in links if not (EXAMPLES / link).exists()] == []


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} >= {"own_data", "finetune"}


@needs_images
@pytest.mark.slow
def test_own_data(tmp_path: Path) -> None:
    """Three folders of hippocampus volumes end with probes, a report, and the embedding of a file that no site had."""
    told = printed(run_notebook(EXAMPLES / "own_data.ipynb", tmp_path))
    assert told.count("16 rows written") == 3
    assert "14 rows written" in told
    assert "brain-mr.t1 = {" in told.replace('"', "")
    assert "large" in told
    assert (tmp_path / "runs" / "own" / "report.html").stat().st_size > 0
    data = read_report_data(tmp_path / "runs" / "own")
    assert [row.stream for row in data.examples.rows] == ["brain-mr.t1"]
    assert set(data.embedding.sites) == {"north", "south", "east", "held out"}
    assert data.cost.cpu_seconds > 0
    written = json.loads((tmp_path / "runs" / "own" / "probe.json").read_text())
    assert {"federated", "site:north", "site:south", "site:east", "untrained"} <= {
        score["arm"] for score in written["scores"]
    }
    table = read_features(tmp_path / "new.npz")
    assert len(table.subjects) == 2
    new = sorted((tmp_path / "new").glob("*.nii.gz"))
    in_python = panfm.load(tmp_path / "runs" / "own").embed({"brain-mr.t1": new})
    np.testing.assert_allclose(in_python, table.features, atol=1e-5)


@needs_images
@pytest.mark.slow
def test_finetune(tmp_path: Path) -> None:
    run_notebook(EXAMPLES / "finetune.ipynb", tmp_path)


def printed(notebook: nbformat.NotebookNode) -> str:
    """All text that the cells printed."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")
