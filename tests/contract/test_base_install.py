"""A site runs with the base install of panfm, without any extra."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("base_install.py")
NOT_OF_A_SITE = {
    "flwr", "jinja2", "numba", "sklearn", "sqlalchemy", "tensorboardX", "threadpoolctl", "ray", "grpc", "onnx",
    "strategies", "server", "client", "simulations",
}  # fmt: skip
NOT_OF_A_WORKER = ("panfm.evaluate", "panfm.report", "panfm.export", "panfm.privacy.audit", "panfm.cli.machine_checks")
MOST_CODE = 7_000
"""Lines that a hospital reviews, without docstrings, comments and empty lines."""


def check(told: str) -> None:
    words = json.loads(told.splitlines()[-1])
    lines = words["lines"]
    code = sum(code_lines(file_of(module)) for module in lines)
    print(f"the worker imported {sum(lines.values())} lines of panfm in {len(lines)} files, {code} of them code")
    assert not NOT_OF_A_SITE & set(words["libraries"])
    assert [name for name in lines if name.startswith(NOT_OF_A_WORKER)] == []
    assert code <= MOST_CODE


def file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def code_lines(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    spans = [
        range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    is_docstring = {number for span in spans for number in span}
    lines = enumerate(text.splitlines(), start=1)
    return sum(number not in is_docstring and line.strip()[:1] not in ("", "#") for number, line in lines)


def run(python: str, folder: Path, *words: str) -> str:
    """Go a site's way in a process that has no checkout on its path, unless the Python's own packages have."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}
    command = [python, str(SCRIPT), str(folder), *words]
    done = subprocess.run(command, cwd=folder.parent, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_site_runs_without_the_libraries_of_the_extras(tmp_path):
    check(run(sys.executable, tmp_path / "site", "--refuse"))


@pytest.mark.slow
def test_a_site_runs_from_a_wheel_with_the_base_alone(tmp_path):
    """In a fresh environment, with versions as pinned; only what is imported is compiled."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    words = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [sys.executable, *words, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True)
    [wheel] = tmp_path.glob("panfm-*.whl")
    pip, constraints = [python, *words], str(ROOT / "constraints.txt")
    install = [*pip, "install", "--no-compile", "--constraint", constraints, str(wheel), "packaging"]
    subprocess.run(install, check=True)
    listed = subprocess.run([*pip, "list", "--format=freeze"], check=True, capture_output=True, text=True).stdout
    installed = {line.partition("==")[0].lower().replace("_", "-") for line in listed.splitlines()}
    assert not installed & {"flwr", "numba", "scikit-learn", "sqlalchemy", "tensorboardx"}
    check(run(python, tmp_path / "site"))
