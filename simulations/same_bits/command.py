"""`python -m simulations same-bits BASE`: compares the results of this tree with those of a commit, bit for bit.

Both versions do the same small runs on this machine, at the same time, each on a cohort that it makes from the same
description. Then models, states, rounds and replies are compared (comparison.py).
"""

import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from panfm.errors import RunError
from simulations.same_bits.comparison import PARTS, Allowances, Difference, compare
from simulations.same_bits.runs import FIRST, Run
from simulations.same_bits.sides import ROOT, Side, checked_out

_MAX_LINES = 5
"""Differing files that are told per run and part."""
Verdicts = Mapping[str, Mapping[str, list[Difference]]]
"""Row of the table -> part -> files that differ."""


def same_bits(base: str, runs: list[Run], console: Console) -> None:
    """Compare this tree, changes that are not committed included, with a commit.

    The folder with all runs and their logs stays where it is unless everything is the same.

    Args:
        base: A commit of this repository.
        runs: Those to do, the first among them.
    Raises:
        ConfigError: there is no such commit.
        RunError: something differs, or a run failed.
    """
    allowances = Allowances.read()
    with checked_out(base) as tree:
        folder = Path(tempfile.mkdtemp(prefix="panfm-same-bits-"))
        console.print(f"work folder: {folder}")
        verdicts = compare_trees(tree, ROOT, folder, runs, allowances, console)
    show(verdicts, allowances, console)
    shutil.rmtree(folder)


def compare_trees(
    base: Path, here: Path, folder: Path, runs: list[Run], allowances: Allowances, console: Console
) -> Verdicts:
    """Do the runs with the code of two trees, and compare them.

    Raises:
        RunError: a run failed, or the versions make different cohorts.
    """
    sides = [Side("base", base, folder / "base"), Side("here", here, folder / "here")]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Side.set_up, sides))
        digests = list(pool.map(lambda side: side.make_cohort(console.print), sides))
        if digests[0] != digests[1]:
            raise RunError("cohort: the files of both sides differ, expected the same bytes; nothing can be compared")
        rest = [run for run in runs if run is not FIRST]
        list(pool.map(lambda side: side.do(rest, console.print), sides))
    return _verdicts(sides, runs, allowances)


def show(verdicts: Verdicts, allowances: Allowances, console: Console) -> None:
    """Print a line per file that differs, the declared differences, and the table. Raises RunError if any differs."""
    for row, parts in verdicts.items():
        for part, differences in parts.items():
            for difference in differences[:_MAX_LINES]:
                console.print(f"{row}: {difference}", markup=False)
            if len(differences) > _MAX_LINES:
                console.print(f"{row}: {part}: and {len(differences) - _MAX_LINES} more files")
    for reason, count in allowances.met.items():
        console.print(f"allowed: {reason}: {count} keys", markup=False)
    for reason in allowances.unused():
        console.print(f"allowed, but not needed any more: {reason}", markup=False)
    console.print(_table(verdicts))
    if differing := [row for row, parts in verdicts.items() if any(parts.values())]:
        raise RunError(f"{len(differing)} of {len(verdicts)} runs differ: {', '.join(differing)}")


def _verdicts(sides: list[Side], runs: list[Run], allowances: Allowances) -> Verdicts:
    base, here = sides
    by_name = {run.name: run for run in runs}
    pairs = {run.name: (base.files(run), here.files(run), run.parts) for run in runs}
    for run in runs:
        if run.resumes_like:
            undisturbed = here.files(by_name[run.resumes_like])
            pairs[f"{run.name} and {run.resumes_like}"] = (undisturbed, here.files(run), run.parts)
    return {row: compare(before, now, allowances.of(row), parts) for row, (before, now, parts) in pairs.items()}


def _table(verdicts: Verdicts) -> Table:
    table = Table("run", *PARTS)
    for row, parts in verdicts.items():
        table.add_row(row, *("-" if part not in parts else "DIFFERS" if parts[part] else "same" for part in PARTS))
    return table
