"""Cost of a federation beyond its training: rounds of `--engine local` over the same rounds in a plain loop.

Both arms train the same sites with the same Trainer, one after the other, and average group by group. The federated arm
adds everything else: messages, packing, guards, the exact mean, validation, private state and checkpoints on disk. The
arms take turns, round by round. A cycle is `train.validate-every` rounds, so that each holds one validation; the ratio
is the median over cycles of (federated cycle / plain cycle), in seconds on the clock, and beside it in CPU seconds,
which a busy machine disturbs less.

The same training takes up to 3 % more or less in one arm than in the other for as long as a process lives, whichever
way its memory happens to lie; so the cycles are spread over fresh processes, one after the other.
"""

import multiprocessing
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from client.app import app as client_app
from panfm.config import RunConfig
from panfm.data.cache import open_store
from panfm.data.store import ImageStore
from panfm.models import describe_model
from panfm.sharing.groups import GroupManifest
from panfm.sharing.weights import GroupWeights, Trained
from panfm.site.session import trained_streams
from panfm.training.trainer import Trainer
from server.handshake import shake_hands
from server.round_attempt import train_round as train_federated_round
from server.rounds import initial_state
from server.run_folder import RunFolder
from server.tracking import Tracking
from simulations.alone import train_round
from simulations.bench._steps import Clock
from simulations.cohorts.prepare import load_simulation, prepare_cohort
from simulations.engines.job import Job
from simulations.engines.local import LocalGrid
from simulations.harness import TRANSIENT, Experiment, bench
from simulations.study_result import StudyResult
from strategies import GroupedMean

_WARM_UP = 2
"""Rounds before those that count: the first two compile the loops of the mean."""


@bench
def main(
    cycles: Annotated[int, typer.Option(min=1, help="Cycles per arm and process, after two rounds to warm up.")] = 2,
    processes: Annotated[int, typer.Option(min=1, help="Fresh processes, one after the other.")] = 6,
    local_steps: Annotated[
        int | None, typer.Option(min=1, help="Local steps of a round, instead of the run's.")
    ] = None,
    experiment: Experiment = TRANSIENT,
) -> StudyResult:
    """Seconds per round: federation in one process against a plain loop."""
    console = Console(soft_wrap=True, highlight=False)
    prepare_cohort(load_simulation(experiment), console)
    config = {"experiment": str(experiment), "cycles": cycles, "processes": processes, "local-steps": local_steps}
    result = StudyResult("round-overhead", config, unit="s")
    for number in range(1, processes + 1):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            measured = pool.submit(measure_cycles, experiment, cycles, number, local_steps).result()
        for arm, values in measured.items():
            for cycle in values:
                result.add(arm, cycle)
        shown = (f"{arm} {sum(cycle['seconds'] for cycle in values):.3f} s" for arm, values in measured.items())
        console.print(f"process {number} of {processes}: {', '.join(shown)}")
    for metric, name in (("seconds", "local_over_plain"), ("cpu_seconds", "local_over_plain_cpu")):
        result.ratios[name] = result.median_ratio(metric, "local", "plain")
        console.print(f"{name}: {result.ratios[name]:.3f}")
    return result


def measure_cycles(
    experiment: Path, cycles: int, number: int, local_steps: int | None = None
) -> dict[str, list[dict[str, float]]]:
    """Arm -> the cost of each of its cycles in this process; every other process begins with the other arm."""
    cycle = load_simulation(experiment).train.validate_every
    overrides = [f"train.rounds={cycles * cycle + _WARM_UP + 1}"]
    overrides += [f"train.local-steps={local_steps}"] if local_steps else []
    run = load_simulation(experiment, overrides)
    sites = prepare_cohort(run, Console(quiet=True)) / "sites"
    measured: dict[str, list[dict[str, float]]] = {"local": [], "plain": []}
    with tempfile.TemporaryDirectory() as folder:
        arms = {"local": federated_rounds(run, sites, Path(folder)), "plain": plain_rounds(run, sites)}
        rounds: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
        for turn in range(cycles * cycle + _WARM_UP):
            for arm in sorted(arms, reverse=bool((turn + number) % 2)):
                rounds[arm].append(_clocked(arms[arm]))
    for arm, taken in rounds.items():
        for start in range(_WARM_UP, len(taken), cycle):
            part = taken[start : start + cycle]
            measured[arm].append({name: sum(cost[name] for cost in part) for name in part[0]})
    return measured


def _clocked(rounds: Iterator[None]) -> dict[str, float]:
    """Seconds on the clock and CPU seconds of the next round."""
    clock = Clock()
    next(rounds)
    return clock.seconds()


def federated_rounds(run: RunConfig, sites: Path, run_dir: Path) -> Iterator[None]:
    """The rounds of the real server and sites over the in-process grid, one at a time."""
    folder = RunFolder.create(run_dir / "run", run)
    run = folder.shared_run
    job = Job(sites, run_dir / "run")
    grid = LocalGrid(client_app, job.num_sites, job.run_config())
    state, manifest = initial_state(run)
    strategy = GroupedMean(run, manifest, shake_hands(grid, run, manifest, num_sites=job.num_sites).roster)
    with Tracking(folder) as tracking:
        while True:
            state, line, _ = train_federated_round(grid, strategy, state)
            folder.append_round(line)
            tracking.round(line)
            folder.save_state(state)
            yield


def plain_rounds(run: RunConfig, sites: Path) -> Iterator[None]:
    """The rounds of a plain loop: train every site, then average group by group."""
    torch.set_num_threads(run.train.threads)
    stores = {path.name: open_store(path, run.streams) for path in sorted(sites.iterdir())}
    trainers = {site: Trainer(run, tuple(trained_streams(run.streams, store))) for site, store in stores.items()}
    state: Mapping[str, Tensor] = Trainer(run).shared_state()
    manifest = GroupManifest.of(describe_model(run).parameter_groups(), state)
    weights = GroupWeights(run.sharing, run.train, run.site_dp, manifest)
    for round_number in range(1, run.train.rounds + 1):
        state = _plain_round(weights, stores, trainers, state, round_number)
        yield


def _plain_round(
    weights: GroupWeights,
    stores: Mapping[str, ImageStore],
    trainers: Mapping[str, Trainer],
    state: Mapping[str, Tensor],
    round_number: int,
) -> dict[str, Tensor]:
    sums = {name: torch.zeros_like(value) for name, value in state.items()}
    totals = dict.fromkeys(state, 0.0)
    group_of = {name: group for group, layout in weights.manifest.groups.items() for name, _ in layout}
    for site, trainer in trainers.items():
        trainer.load_shared({name: state[name] for name in trainer.model.state_dict()})
        result = train_round(trainer, stores[site], site, round_number)
        trained = Trained(result.subjects, result.subjects_per_stream, result.num_steps)
        for name, value in trainer.shared_state().items():
            (weight,) = weights.weights(group_of[name], trained)
            sums[name] += weight * value
            totals[name] += weight
    return {name: sums[name] / totals[name] if totals[name] else state[name] for name in state}
