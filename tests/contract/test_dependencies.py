"""What is imported is declared, and what is declared is pinned."""

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
HOUSE = ("panfm", "strategies", "server", "client", "simulations", "tests")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def names(requirements: list[str]) -> set[str]:
    """Distributions, without this project's own."""
    return {Requirement(line).name.lower().replace("_", "-") for line in requirements} - {"panfm"}


def of_extras(*extras: str) -> set[str]:
    """What the base and some extras ask for; of extras that name others, these too."""
    lines = [line for line in PROJECT["dependencies"] if is_asked(Requirement(line), extras)]
    declared = [Requirement(line) for extra in extras for line in EXTRAS[extra]]
    inner = {extra for requirement in declared if requirement.name == "panfm" for extra in requirement.extras}
    return names([*lines, *map(str, declared)]) | (of_extras(*inner) if inner else set())


def is_asked(requirement: Requirement, extras: tuple[str, ...]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))


@cache
def roots_of(package: str) -> frozenset[str]:
    """First parts of the names of modules that a package imports, at any depth of its functions."""
    roots: set[str] = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots.add((node.module or "").split(".")[0])
    return frozenset(roots)


distributions = cache(packages_distributions)
PEERS = {"fedlab", "nvflare", "pfl"}
"""What `bench peers` installs into environments of their own."""


def imported(*packages: str) -> set[str]:
    """Distributions that the packages import from, at whatever depth."""
    foreign = frozenset().union(*map(roots_of, packages)) - set(sys.stdlib_module_names) - set(HOUSE) - PEERS
    return {distributions()[root][0].lower().replace("_", "-") for root in foreign}


@pytest.mark.parametrize(
    ("packages", "extras"),
    [
        (("panfm",), ("evaluate", "report", "server", "onnx", "weights")),
        (("client",), ("client",)),
        (("panfm", "strategies", "server"), ("evaluate", "report", "server", "onnx", "weights")),
        (("simulations",), ("simulation",)),
        (("tests",), tuple(EXTRAS)),
    ],
)
def test_what_is_imported_is_declared(packages, extras):
    assert imported(*packages) <= of_extras(*extras)


def test_all_that_is_declared_is_imported():
    assert of_extras("client", "server", "evaluate", "report", "weights") == imported(*HOUSE[:4])


def test_the_base_is_what_a_site_runs():
    assert of_extras("site") == of_extras()
    assert not of_extras() & {"flwr", "numba", "jinja2", "scikit-learn", "sqlalchemy", "tensorboardx", "threadpoolctl"}


def test_what_is_declared_is_pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", pin) for pin in pins)
    assert names([*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]) <= names(pins)
