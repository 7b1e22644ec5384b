"""What is imported is declared, and what is declared is pinned."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOUSE = ("panfm", "strategies", "server", "client", "simulations", "tests")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~ ]", line)[0].lower().replace("_", "-") for line in requirements}


def imported(*packages: str) -> set[str]:
    """Distributions that the packages import from, at whatever depth."""
    roots: set[str] = set()
    for path in (path for package in packages for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots.add((node.module or "").split(".")[0])
    foreign = roots - set(sys.stdlib_module_names) - set(HOUSE)
    known = packages_distributions()
    return {known[root][0].lower().replace("_", "-") for root in foreign}


@pytest.mark.parametrize(
    ("packages", "declared"),
    [
        (HOUSE[:4], PROJECT["dependencies"] + EXTRAS["onnx"]),
        (("simulations",), PROJECT["dependencies"] + EXTRAS["simulation"]),
        (("tests",), [*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]),
    ],
)
def test_what_is_imported_is_declared(packages, declared):
    assert imported(*packages) <= names(declared)


def test_the_library_imports_all_that_it_declares():
    assert names(PROJECT["dependencies"]) == imported(*HOUSE[:4])


def test_what_is_declared_is_pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", pin) for pin in pins)
    assert names([*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]) <= names(pins)
