"""Shared parts of studies and benches: options, jobs over worker processes with the time left, and the result file.

A study is a list of independent jobs (arm x draw x seed), each of which yields measurements. Every arm takes the same
(draw, seed) pairs in the same order, so that differences between arms are paired.
"""

import itertools
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console

from panfm.errors import ConfigError
from panfm.outputs import append_json_line, read_json_lines
from simulations.study_result import StudyResult, commit, kept_jobs

Experiment = Annotated[Path, typer.Option(help="Run description (TOML).")]

J = TypeVar("J")
R = TypeVar("R")

WORKERS = 2
_EXPERIMENTS = Path(__file__).resolve().parents[1] / "configs" / "experiments"
QUICKSTART = _EXPERIMENTS / "quickstart.toml"
"""The run of `make demo`."""
TRANSIENT = _EXPERIMENTS / "transient.toml"
"""The run that studies and benches of masking, sharing, coding and privacy start from."""


@dataclass(frozen=True)
class StudyOptions:
    """Options of every study."""

    seeds: int = 5
    """Training seeds per phantom draw."""
    draws: int | None = 1
    """Phantom draws; None where every seed trains on a draw of its own."""
    first_seed: int = 0
    """First training seed and first phantom draw."""
    workers: int = WORKERS
    json: Path | None = None
    """Path of the result file."""

    def pairs(self) -> list[tuple[int, int]]:
        """All (draw, seed), in the one order that every arm keeps."""
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        if self.draws is None:
            return [(seed, seed) for seed in seeds]
        return list(itertools.product(self.draw_numbers(), seeds))

    def draw_numbers(self) -> list[int]:
        """Every phantom draw, once."""
        return list(range(self.first_seed, self.first_seed + (self.seeds if self.draws is None else self.draws)))


@dataclass(frozen=True)
class CohortJob:
    """One draw of a study's cohort, to be written as files."""

    draw: int
    folder: Path
    subjects: int | None = None
    """Patients of each site, or of each stream at its site, instead of the study's number."""
    holdout: int | None = None
    """Held-out patients, instead of the study's number."""

    def __str__(self) -> str:
        return f"draw {self.draw}: writing files"


@dataclass(frozen=True)
class ArmJob:
    """One arm, to be trained once and measured."""

    draw: int
    seed: int
    arm: str
    length: int
    """Rounds or steps, as the study counts its budget."""
    cohort: Path

    def __str__(self) -> str:
        return f"draw {self.draw}, seed {self.seed}, {self.arm}, length {self.length}"


def study(
    *, seeds: int, draws: int | None = 1, budgets: Mapping[str, int] | None = None, unit: str = ""
) -> Callable[[Callable[..., StudyResult]], Callable[..., None]]:
    """Decorate the command of a study, which takes StudyOptions and options of its own, and returns its result.

    The command gets --seeds, --draws, --first-seed and --json; its result is written where --json says.

    Args:
        seeds: Default of --seeds.
        draws: Default of --draws; None if every seed trains on a draw of its own, and there is no --draws.
        budgets: Steps or rounds by name; the command gets --budget with these names, and the name as `budget`.
        unit: What budgets count.
    """
    shared = [
        _option("seeds", int, seeds, min=1, help="Training seeds per draw."),
        *([] if draws is None else [_option("draws", int, draws, min=1, help="Phantom draws.")]),
        _option("first_seed", int, 0, help="First training seed and first draw."),
    ]
    if budgets:
        sizes = ", ".join(f"{name} ({length:,})" for name, length in budgets.items())
        shared.append(_option("budget", str, next(iter(budgets)), help=f"Number of {unit}: {sizes}."))

    def decorate(command: Callable[..., StudyResult]) -> Callable[..., None]:
        def work(path: Path | None, seeds: int, first_seed: int, draws: int | None = None, **own: Any) -> StudyResult:
            return command(StudyOptions(seeds, draws, first_seed, json=path), **own)

        def check(arguments: Mapping[str, Any]) -> None:
            if budgets and arguments["budget"] not in budgets:
                raise typer.BadParameter(f"expected one of {', '.join(budgets)}", param_hint="--budget")

        names = {"options", *(option.name for option in shared)}
        own = [option for name, option in signature(command).parameters.items() if name not in names]
        return _command(work, [*shared, *own], command.__doc__, check)

    return decorate


def bench(command: Callable[..., StudyResult]) -> Callable[..., None]:
    """Decorate the command of a bench, which returns its result: it gets --json, and the result is written there."""
    own = list(signature(command).parameters.values())
    return _command(lambda _, **arguments: command(**arguments), own, command.__doc__)


def _option(name: str, kind: Any, default: object, **settings: Any) -> Parameter:
    annotation = Annotated[kind, typer.Option(**settings)]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _command(
    work: Callable[..., StudyResult],
    options: Sequence[Parameter],
    doc: str | None,
    check: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> Callable[..., None]:
    """A function that typer reads as a command with some options and --json, whose path is tried before the work."""
    json = _option("json", Path | None, None, help="Write the result here.")
    parameters = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in (*options, json)]
    described = Signature(parameters)

    def main(**given: Any) -> None:
        bound = described.bind(**given)
        bound.apply_defaults()
        check(bound.arguments)
        path: Path | None = bound.arguments.pop("json")
        check_writable(path)
        result = work(path, **bound.arguments)
        if path:
            result.write(path)

    main.__doc__ = doc
    main.__signature__ = described  # type: ignore[attr-defined]
    return main


def chosen_arms(names: str, known: Collection[str], option: str = "--arms") -> list[str]:
    """Arms by their names, with commas between, in the order of `known`. Raises typer.BadParameter for others."""
    if unknown := sorted({*names.split(",")} - {*known}):
        raise typer.BadParameter(f"{unknown[0]}: expected some of {', '.join(known)}", param_hint=option)
    return [arm for arm in known if arm in names.split(",")]


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


def run_arms(
    options: StudyOptions,
    arms: Sequence[str],
    length: int,
    write_draw: Callable[[CohortJob], Path],
    measure: Callable[[ArmJob], dict[str, float]],
) -> list[tuple[ArmJob, dict[str, float]]]:
    """Write a cohort per draw, then measure every arm on every pair.

    Args:
        options: Of the study.
        arms: Names of the arms.
        length: Rounds or steps of each.
        write_draw: Writes one cohort, and returns its folder.
        measure: Trains and measures one arm.
    Returns:
        Jobs and their measurements, in the order of the pairs.
    """
    with tempfile.TemporaryDirectory() as scratch:
        cohorts = [CohortJob(draw, Path(scratch, str(draw))) for draw in options.draw_numbers()]
        written = run_jobs(write_draw, cohorts, workers=options.workers)
        folders = dict(zip(options.draw_numbers(), written, strict=True))
        jobs = [ArmJob(draw, seed, arm, length, folders[draw]) for draw, seed in options.pairs() for arm in arms]
        return list(zip(jobs, run_jobs(measure, jobs, workers=options.workers, keep_for=options.json), strict=True))


def run_jobs(
    work: Callable[[J], R], jobs: Sequence[J], *, workers: int = WORKERS, keep_for: Path | None = None
) -> list[R]:
    """Do all jobs in worker processes of one torch thread each; results in the order of the jobs.

    After each job one line on stderr tells which it was, what it took and how long the rest will take.

    Args:
        work: A module-level function.
        jobs: Picklable; `str(job)` tells it from all others, and is shown as progress.
        keep_for: A result file; until it is written, results are kept line by line in `<file>.jobs`, and jobs that the
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
            append_json_line(kept_jobs(keep_for), {"commit": commit(), "job": str(jobs[index]), "result": result})
        elapsed = time.monotonic() - begin
        left = elapsed / (len(results) - num_before) * (len(jobs) - len(results))
        console.print(f"[{len(results)}/{len(jobs)}] {jobs[index]}: {_clock(elapsed)} gone, {_clock(left)} left")
    return [results[index] for index in range(len(jobs))]


def _done_before(jobs: Sequence[J], keep_for: Path) -> dict[int, Any]:
    """Results that an interrupted study of this very commit has kept."""
    path, now = kept_jobs(keep_for), commit()
    if now.endswith("-dirty") or now == "unknown":
        return {}
    lines = [line for line in read_json_lines(path) if line.get("commit") == now]
    results = {line["job"]: _with_nan(line["result"]) for line in lines}
    return {index: results[str(job)] for index, job in enumerate(jobs) if str(job) in results}


def _with_nan(measured: Mapping[str, float | None]) -> dict[str, float]:
    return {metric: math.nan if value is None else value for metric, value in measured.items()}


@contextmanager
def background_jobs(work: Callable[[J], R], jobs: Sequence[J], *, workers: int = 1) -> Iterator[Callable[[], list[R]]]:
    """Do jobs in worker processes of one torch thread each, while this process does other work.

    Workers are terminated where the block fails.

    Args:
        work: A module-level function.
        jobs: Picklable.
    Yields:
        A function that waits for all jobs, and returns their results in the order of the jobs.
    """
    with _worker_pool(workers) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            yield lambda: [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _worker_pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))


def _as_they_finish(work: Callable[[J], R], jobs: Mapping[int, J], workers: int) -> Iterator[tuple[int, R]]:
    if workers == 1:
        yield from ((index, work(job)) for index, job in jobs.items())
        return
    with _worker_pool(workers) as pool:
        futures = {pool.submit(work, job): index for index, job in jobs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
