"""Cases of a parametrised test, some of them slow; copies of this repository's packages."""

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def quick(cases: Iterable, quick_ones: int | Collection) -> list:
    """Mark the cases slow that are not among the first few, or not among those given.

    Tuples are the arguments of one case each.
    """
    listed = list(cases)
    kept = listed[:quick_ones] if isinstance(quick_ones, int) else quick_ones
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in kept else pytest.mark.slow)
        for case in listed
    ]


def copy_packages(folder: Path, *packages: str) -> None:
    """Copy packages of this repository into a folder, with the bytecode that their interpreter has compiled."""
    for package in packages:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("*.pyc.*"))
