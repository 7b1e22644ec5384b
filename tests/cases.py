"""Cases of a parametrised test, some of them slow; copies of this repository's packages; approvals of operators."""

import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

import pytest

from panfm.config import RunConfig, experiment_hash, load_site

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


def approve(folder: Path, run: RunConfig) -> str:
    """Approve an experiment at a site, as its operator would; returns its hash."""
    from panfm.site.decisions import WritableApprovals

    before = os.umask(0o077)  # as in every command
    try:
        WritableApprovals(folder, load_site(folder)).approve(experiment := experiment_hash(run), by="operator")
    finally:
        os.umask(before)
    return experiment
