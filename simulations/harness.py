"""Parts that studies and benches share: jobs over worker processes with the time left, and the result file.

A study is a list of independent jobs (arm x draw x seed), each of which yields measurements. Every arm takes the same
(draw, seed) pairs in the same order, so that differences between arms are paired.
"""

import itertools
import math
import multiprocessing
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
import typer
from rich.console import Console

from panfm.errors import ConfigError
from panfm.files import append_json_line, json_text, read_json_lines, write_atomic

Seeds = Annotated[int, typer.Option(min=1, help="Training seeds per draw.")]
Draws = Annotated[int, typer.Option(min=1, help="Phantom draws.")]
FirstSeed = Annotated[int, typer.Option(help="First training seed and first draw.")]
JsonFile = Annotated[Path | None, typer.Option(help="Write the result here.")]
Experiment = Annotated[Path, typer.Option(help="Run description (TOML).")]
"""What the user may ask of any study or bench."""

J = TypeVar("J")
R = TypeVar("R")

WORKERS = 2
QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "experiments" / "quickstart.toml"
"""The run that studies and benches start from."""


@dataclass(frozen=True)
class StudyOptions:
    """Options that every study has."""

    seeds: int = 5
    """Training seeds per phantom draw."""
    draws: int = 1
    """Phantom draws."""
    first_seed: int = 0
    """First training seed and first phantom draw."""
    workers: int = WORKERS
    json: Path | None = None
    """Where the result goes."""

    def pairs(self) -> list[tuple[int, int]]:
        """All (draw, seed), in the one order that every arm keeps."""
        draws = range(self.first_seed, self.first_seed + self.draws)
        return list(itertools.product(draws, range(self.first_seed, self.first_seed + self.seeds)))

    def draw_numbers(self) -> list[int]:
        """Every phantom draw, once."""
        return sorted({draw for draw, _ in self.pairs()})


@dataclass(frozen=True)
class Target:
    """A target of a study: a number, and the least that it should be."""

    claim: str
    found: float
    least: float

    @property
    def is_met(self) -> bool:
        """Whether the target is met; False if the number is NaN."""
        return self.found >= self.least

    def __str__(self) -> str:
        verdict = "met" if self.is_met else "MISSED"
        return f"target {verdict}: {self.claim} is {self.found:+.4f}, wanted at least {self.least:+.4g}"


@dataclass
class StudyResult:
    """Measurements of a study, by metric and arm."""

    name: str
    config: dict[str, Any]
    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """(metric, arm) -> one value per pair, in the order of the pairs. A metric measured in several places is written
    `<place>/<metric>`: `lasting/auc`, `neuro-centre/auc`."""
    ratios: dict[str, float] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    unit: str = "1"

    def add(self, arm: str, measured: Mapping[str, float]) -> None:
        """Append one job's measurements; call in the order of the pairs."""
        for metric, value in measured.items():
            self.values.setdefault((metric, arm), []).append(float(value))

    def mean(self, metric: str, arm: str) -> float:
        """Mean over the pairs."""
        return float(np.mean(self.values[metric, arm]))

    def gain(self, metric: str, arm: str, baseline: str) -> list[float]:
        """Arm minus baseline, pair by pair."""
        pairs = zip(self.values[metric, arm], self.values[metric, baseline], strict=True)
        return [mine - other for mine, other in pairs]

    def share_won(self, metric: str, arm: str, baseline: str) -> float:
        """Share of the pairs in which the arm is ahead."""
        return float(np.mean(np.array(self.gain(metric, arm, baseline)) > 0))

    def write(self, path: Path) -> None:
        """Write the result file; numbers that are not finite become null.

        ```
        {"name", "config", "commit",
         "results": [{"metric", "of": place, if any, "arm", "values": [one per pair], "mean", "sd", "n", "unit"}],
         "ratios": {name: number},
         "targets": [{"claim", "found", "at_least", "met"}]}
        ```
        """
        rows = [
            {
                **_metric_and_place(metric),
                "arm": arm,
                "values": values,
                "mean": float(np.mean(values)),
                "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
                "n": len(values),
                "unit": self.unit,
            }
            for (metric, arm), values in self.values.items()
        ]
        targets = [
            {"claim": each.claim, "found": each.found, "at_least": each.least, "met": each.is_met}
            for each in self.targets
        ]
        table = {
            "name": self.name,
            "config": self.config,
            "commit": commit(),
            "results": rows,
            "ratios": self.ratios,
            "targets": targets,
        }
        write_atomic(path, f"{json_text(table, indent=1)}\n".encode())
        _kept_jobs(path).unlink(missing_ok=True)


def steps_of(budget: str, budgets: Mapping[str, int]) -> int:
    """Steps or rounds of a budget that the user named. Raises BadParameter: there is none of this name."""
    if budget not in budgets:
        raise typer.BadParameter(f"expected one of {', '.join(budgets)}", param_hint="--budget")
    return budgets[budget]


def check_writable(path: Path | None) -> None:
    """Raises ConfigError if a result file could not be written when the work is done."""
    if path is None:
        return
    try:
        is_new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written ({error.strerror}), expected a file") from error


def run_jobs(
    work: Callable[[J], R], jobs: Sequence[J], *, workers: int = WORKERS, keep_for: Path | None = None
) -> list[R]:
    """Do all jobs in worker processes of one torch thread each; results in the order of the jobs.

    After each job one line on stderr tells which it was, what it took and how long the rest will take.

    Args:
        work: a module-level function.
        jobs: picklable; `str(job)` says all that sets it apart, and is what the progress shows.
        keep_for: a result file; until it is written, results are kept line by line in `<file>.jobs`, and jobs that the
            same commit has done are not done again.
    """
    commit()  # before the tree can move on
    begin, console = time.monotonic(), Console(stderr=True, highlight=False, soft_wrap=True)
    results: dict[int, R] = _done_before(jobs, keep_for) if keep_for else {}
    if num_before := len(results):
        console.print(f"[{num_before}/{len(jobs)}] done before")
    todo = {index: job for index, job in enumerate(jobs) if index not in results}
    for index, result in _as_they_finish(work, todo, workers):
        results[index] = result
        if keep_for:
            append_json_line(_kept_jobs(keep_for), {"commit": commit(), "job": str(jobs[index]), "result": result})
        elapsed = time.monotonic() - begin
        left = elapsed / (len(results) - num_before) * (len(jobs) - len(results))
        console.print(f"[{len(results)}/{len(jobs)}] {jobs[index]}: {_clock(elapsed)} gone, {_clock(left)} left")
    return [results[index] for index in range(len(jobs))]


def _metric_and_place(name: str) -> dict[str, str]:
    """`lasting/auc` as the row keys `metric` (auc) and `of` (lasting)."""
    place, _, metric = name.rpartition("/")
    return {"metric": metric, "of": place} if place else {"metric": metric}


@cache
def commit() -> str:
    """Commit of the source tree when first asked, with `-dirty` when it has been changed since; `unknown` outside a git
    checkout."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _done_before(jobs: Sequence[J], keep_for: Path) -> dict[int, Any]:
    """Results that an interrupted study of this very commit has kept."""
    path, now = _kept_jobs(keep_for), commit()
    if now.endswith("-dirty") or now == "unknown":
        return {}
    lines = [line for line in read_json_lines(path) if line.get("commit") == now]
    results = {line["job"]: _with_nan(line["result"]) for line in lines}
    return {index: results[str(job)] for index, job in enumerate(jobs) if str(job) in results}


def _with_nan(measured: Mapping[str, float | None]) -> dict[str, float]:
    return {metric: math.nan if value is None else value for metric, value in measured.items()}


def _as_they_finish(work: Callable[[J], R], jobs: Mapping[int, J], workers: int) -> Iterator[tuple[int, R]]:
    if workers == 1:
        yield from ((index, work(job)) for index, job in jobs.items())
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(work, job): index for index, job in jobs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _kept_jobs(path: Path) -> Path:
    return path.with_name(f"{path.name}.jobs")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
