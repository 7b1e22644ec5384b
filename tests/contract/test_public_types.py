"""mypy knows the types of `panfm.load`, `panfm.runs` and the registration decorators."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
from typing import assert_type

import numpy as np
from numpy.typing import NDArray

import panfm
from panfm.config.objective import ObjectiveConfig
from panfm.notebook.loaded_model import Encoder
from panfm.notebook.run_tables import RunTables
from panfm.notebook.token_grid import TokenGrid

model = panfm.load("runs/demo")
assert_type(model, panfm.Model)
assert_type(model.embed({"brain-mr": ["a.nii.gz", None]}), NDArray[np.float32])
assert_type(model.tokens({"brain-mr": "a.nii.gz"}), dict[str, TokenGrid])
assert_type(model.encoder, Encoder)
assert_type(panfm.runs("runs"), RunTables)

@panfm.objective("mine")
class MyConfig(ObjectiveConfig):
    name: str = "mine"

assert_type(MyConfig, type[MyConfig])
panfm.load(3)
panfm.objectives
"""


@pytest.mark.slow
def test_a_type_checker_knows_the_packages_own_names(tmp_path):
    (tmp_path / "user.py").write_text(PROGRAM)
    words = ["-m", "mypy", "--no-error-summary", str(tmp_path / "user.py")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    load, objectives = done.stdout.splitlines()
    assert 'Argument 1 to "load" has incompatible type "int"' in load
    assert 'Module has no attribute "objectives"' in objectives
