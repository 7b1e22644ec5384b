"""Tells whether a bench has become slower: its ratios at a reduced size against those of an earlier commit.

Compared are ratios of two things that take turns in one run, of CPU seconds or bytes where the bench has them, so that
another machine or other load moves them little. All are better when they are smaller. A bench with a ratio that is too
large is measured again, up to four times in all, and the smallest counts: load comes and goes, a regression stays.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console

from panfm.errors import ConfigError, RunError
from panfm.outputs import write_json
from simulations.study_result import commit

MOST = 1.2
"""A ratio may be so many times as large as the kept one."""
KEPT = Path(__file__).parent / "bench" / "kept_ratios.json"
_KEEP_TURNS = 3
_MOST_TURNS = 4


@dataclass(frozen=True)
class Reduced:
    """A bench at a size that takes a few seconds."""

    options: tuple[str, ...]
    ratios: tuple[str, ...]
    """Those that are compared."""


REDUCED: Mapping[str, Reduced] = {
    "aggregate": Reduced(("--turns", "3", "--most-sites", "4"), ("ours_over_flower_cpu", "peak_copies")),
    "dex-step": Reduced(("--turns", "3", "--shrink", "8"), ("dex_over_dense", "dex_over_naive")),
    "dp-step": Reduced(("--turns", "2", "--shrink", "8"), ("dense", "dex", "dense_memory", "dex_memory")),
    "local-step": Reduced(("--turns", "3", "--subjects", "6"), ("over_dense", "over_matmul")),
    "parts-bytes": Reduced((), ("mean/last-blocks 2", "mean/norms", "mean/lora r8, 12 blocks")),
    "round-overhead": Reduced(("--cycles", "1", "--processes", "1", "--local-steps", "2"), ("local_over_plain_cpu",)),
    "sgm-overhead": Reduced(("--turns", "3"), ("attention", "value")),
    "thousand-sites": Reduced(("--sites", "12", "--rounds", "3"), ("over_pure_cpu", "memory_grown", "files_grown")),
}
"""Benches that are compared. Not compared: `deployment-overhead` (starts servers), `peers` (installs packages) and
`scale` (whose exponents hardly move when everything gets slower)."""

Measure = Callable[[str, Reduced], Mapping[str, float]]


def measure(name: str, reduced: Reduced) -> dict[str, float]:
    """Ratios of a bench at its reduced size, in a process of its own. Raises RunError if it failed.

    Compiled loops are kept in the virtual environment: to compile them would take longer than what is measured.
    """
    environment = {"NUMBA_CACHE_DIR": str(Path(sys.prefix, "numba")), **os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        words = [sys.executable, "-m", "simulations", "bench", name, *reduced.options, "--json", str(path)]
        done = subprocess.run(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
        )
        if done.returncode:
            raise RunError(f"bench {name}: ended with status {done.returncode}, expected 0: {done.stdout[-2000:]}")
        ratios = json.loads(path.read_text(encoding="utf-8"))["ratios"]
    return {ratio: math.nan if ratios[ratio] is None else float(ratios[ratio]) for ratio in reduced.ratios}


def read_kept(path: Path, names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Bench -> ratio -> kept value, for some benches.

    Raises:
        ConfigError: a bench or a ratio has none, or was measured at another size.
    """
    remedy = "`python -m simulations bench-check --keep` measures it"
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept: dict[str, dict[str, float]] = {}
    for name in names:
        reduced, entry = REDUCED[name], table.get(name)
        if entry is None:
            raise ConfigError(f"{path}: holds nothing of bench {name}; {remedy}")
        if entry["options"] != [*reduced.options]:
            raise ConfigError(
                f"{path}: {name} was measured with {entry['options']}, expected {[*reduced.options]}; {remedy}"
            )
        if {*entry["ratios"]} != {*reduced.ratios}:
            present = ", ".join(entry["ratios"])
            raise ConfigError(
                f"{path}: {name} has the ratios {present}, expected {', '.join(reduced.ratios)}; {remedy}"
            )
        for ratio, value in entry["ratios"].items():
            if not (isinstance(value, float | int) and value > 0.0):
                raise ConfigError(f"{path}: {name} {ratio} is {value}, expected a number above 0; {remedy}")
        kept[name] = entry["ratios"]
    return kept


def too_large(measured: Mapping[str, float], kept: Mapping[str, float]) -> list[str]:
    """Names of the ratios that have grown by more than a fifth, or are no numbers."""
    return [ratio for ratio, value in measured.items() if not value <= MOST * kept[ratio]]


def check(names: Iterable[str], console: Console, *, path: Path = KEPT, measure_fn: Measure = measure) -> None:
    """Measure benches and compare their ratios with the kept ones.

    Raises:
        ConfigError: a kept ratio is missing.
        RunError: a ratio is more than a fifth above the kept one, each of four times.
    """
    names = [*names]
    kept, grown = read_kept(path, names), []
    for name in names:
        measured = dict(measure_fn(name, REDUCED[name]))
        for _ in range(_MOST_TURNS - 1):
            if not too_large(measured, kept[name]):
                break
            again = measure_fn(name, REDUCED[name])
            measured = {ratio: _smaller(value, again[ratio]) for ratio, value in measured.items()}
        worse = too_large(measured, kept[name])
        for ratio, value in measured.items():
            verdict = "  TOO LARGE" if ratio in worse else ""
            console.print(f"{name} {ratio}: {value:.3f}, kept {kept[name][ratio]:.3f}{verdict}")
        grown += [f"{name} {ratio} {measured[ratio]:.3f} (kept {kept[name][ratio]:.3f})" for ratio in worse]
    if grown:
        bound = f"expected at most {MOST:g} times the kept ratio"
        raise RunError(
            f"bench-check: {'; '.join(grown)}: {bound}; if it is meant, `bench-check --keep` keeps the new one"
        )


def keep(names: Iterable[str], console: Console, *, path: Path = KEPT, measure_fn: Measure = measure) -> None:
    """Measure benches three times and keep the median of each ratio; other benches keep theirs."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in names:
        reduced = REDUCED[name]
        turns = [measure_fn(name, reduced) for _ in range(_KEEP_TURNS)]
        ratios = {ratio: round(median(turn[ratio] for turn in turns), 4) for ratio in reduced.ratios}
        table[name] = {"options": [*reduced.options], "commit": commit(), "ratios": ratios}
        write_json(path, dict(sorted(table.items())), indent=1)
        console.print(f"{name}: " + ", ".join(f"{ratio} {value:.3f}" for ratio, value in ratios.items()))


def chosen(names: Iterable[str]) -> list[str]:
    """Benches by their names, all without names. Raises ConfigError for others."""
    names = [*names] or [*REDUCED]
    for name in names:
        if name not in REDUCED:
            raise ConfigError(f"{name}: unknown, expected one of {', '.join(REDUCED)}")
    return names


def _smaller(first: float, second: float) -> float:
    """The smaller of two values, and a number rather than NaN."""
    return second if math.isnan(first) or second < first else first
