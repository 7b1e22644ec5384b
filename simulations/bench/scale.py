"""How cost grows: CPU seconds against sites, subjects, organs, tokens, experts and parameters, with fitted exponents.

    sites       one aggregation of that many replies of a small model at the server
    subjects    a first pass over that many patients of two organs: their patch features, and a step per 16 patients
    organs      a step of 16 patients, tiny model
    tokens      a step of 8 pictures cut into that many patches, small model
    experts     a step of 8 pictures with that many experts, 2 of them active, tiny model
    parameters  a step of 4 patients with seven organs; nano, tiny, small, base

An exponent is the slope of the straight line through the medians over the turns, both axes logarithmic: 1 is in
proportion, 0 is no growth. `<what>_at_end` is the slope between the two largest alone. Values of one line take turns
in one process on one thread.

`projection` puts measured seconds and counted sizes into the formulas of `panfm plan`: ViT-B, 20 sites of 50,000
patients with seven organs of 96^3 voxels in patches of 16^3, rounds of a tenth of a pass over a site's patients.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated

import numpy as np
import torch
import typer
from flwr.clientapp import ClientApp
from rich.console import Console

from panfm.anatomy import DEFAULT_ORGANS
from panfm.config import RunConfig, parse_run
from panfm.models import describe_model
from panfm.models.packing import trained_manifest
from panfm.models.sizes import sizes_of
from panfm.planning import run_cost
from panfm.training.trainer import Trainer
from simulations.bench._steps import Clock, in_turns, noise_store, step_seconds
from simulations.bench.aggregate import Updates, ours
from simulations.cohorts.prepare import load_simulation
from simulations.engines.local import LocalGrid
from simulations.harness import TRANSIENT, bench, chosen_arms
from simulations.study_result import StudyResult

Arms = dict[str, Callable[[int], float]]
"""Value of what grows -> a function that takes one turn and returns CPU seconds."""

SITES, PATIENTS, BATCH = 20, 50_000, 32
MEGABITS = {"site": 100.0, "coordinator": 1000.0}
"""Assumed links."""
_VOLUME = "{ spacing-mm = [2.0, 2.0, 2.0], shape = [96, 96, 96], patch = [16, 16, 16] }"
_SMALL_VOLUME = "{ spacing-mm = [8.0, 8.0, 8.0], shape = [24, 24, 24], patch = [8, 8, 8] }"
_MASKS = 'masking = { policy = "random", ratio = 0.6 }\n'
_PATIENTS_PER_STEP = 2


def organs_run(size: str, batch: int, steps: int, *, organs: int = 7, stream: str = _SMALL_VOLUME) -> RunConfig:
    """A run over some organs in MR."""
    streams = "".join(f"streams.{organ}-mr = {stream}\n" for organ in DEFAULT_ORGANS[:organs])
    train = f"train = {{ rounds = 1, local-steps = {steps}, batch-size = {batch} }}\n"
    return parse_run(f'name = "scale"\nmodel.size = "{size}"\n{_MASKS}{train}{streams}')


def _pictures_run(model: str, side: int, steps: int) -> RunConfig:
    stream = f"streams.chest-xray = {{ shape = [{side}, {side}], patch = [16, 16] }}\n"
    train = f"train = {{ rounds = 1, local-steps = {steps}, batch-size = 8 }}\n"
    return parse_run(f'name = "scale"\nmodel = {{ {model} }}\n{_MASKS}{train}{stream}')


def _stepping(run: RunConfig) -> Callable[[int], float]:
    store = noise_store(run.streams, run.seed, run.train.batch_size, "scale")
    return partial(step_seconds, Trainer(run), store)


def _sites(_: int) -> Arms:
    updates = Updates.draw(load_simulation(TRANSIENT))
    LocalGrid(ClientApp(), 1, {})  # messages want to know which run they are in

    def aggregation(number: int, _: int) -> float:
        return ours(updates, number)["cpu_seconds"]

    return {str(number): partial(aggregation, number) for number in (4, 8, 16, 32)}


def _subjects(turns: int) -> Arms:
    def first_pass(number: int, turn: int) -> float:
        run = organs_run("nano", 16, (turns + 1) * number, organs=2)
        store, trainer = noise_store(run.streams, turn, number, "scale"), Trainer(run)
        clock = Clock()
        everyone, steps = np.arange(number), run_cost.steps_of(number, 16)
        trainer.train(store, everyone, first_step=0, num_steps=steps, site="bench", round_number=turn)
        return clock.seconds()["cpu_seconds"]

    return {str(number): partial(first_pass, number) for number in (32, 64, 128, 256)}


def _organs(turns: int) -> Arms:
    return {str(number): _stepping(organs_run("tiny", 16, turns + 1, organs=number)) for number in (1, 2, 4, 7)}


def _tokens(turns: int) -> Arms:
    model = 'size = "small", tokenizer = "patch"'
    return {str((side // 16) ** 2): _stepping(_pictures_run(model, side, turns + 1)) for side in (112, 160, 224, 320)}


def _experts(turns: int) -> Arms:
    model = 'size = "tiny", tokenizer = "patch", backbone = "director-experts", hidden-multiple = 2'
    return {
        str(number): _stepping(_pictures_run(f"{model}, experts = {{ count = {number} }}", 224, turns + 1))
        for number in (2, 4, 8, 16)
    }


def _parameters(turns: int) -> Arms:
    runs = [organs_run(size, 4, turns + 1) for size in ("nano", "tiny", "small", "base")]
    return {str(sizes_of(run).parameters): _stepping(run) for run in runs}


GROWING: Mapping[str, Callable[[int], Arms]] = {
    "sites": _sites,
    "subjects": _subjects,
    "organs": _organs,
    "tokens": _tokens,
    "experts": _experts,
    "parameters": _parameters,
}
"""What grows -> its arms, given the number of turns."""


@bench
def main(
    turns: Annotated[int, typer.Option(min=1, help="Turns per value, after one to warm up.")] = 3,
    axes: Annotated[str, typer.Option(help="What grows, with commas between.")] = ",".join(GROWING),
    projection: Annotated[bool, typer.Option(help="Measure a step of ViT-B for the projection.")] = True,
) -> StudyResult:
    """CPU seconds against sites, subjects, organs, tokens, experts and parameters: fitted exponents."""
    torch.set_num_threads(1)
    console = Console(soft_wrap=True, highlight=False)
    names = chosen_arms(axes, GROWING, "--axes")
    pairs = [[0, turn] for turn in range(turns)]
    result = StudyResult("scale", {"turns": turns, "axes": names, "pairs": pairs}, unit="CPU s")
    for name in names:
        medians = {}
        for value, seconds in in_turns(GROWING[name](turns), turns).items():
            result.values[f"{name}/seconds", value] = seconds
            medians[float(value)] = float(np.median(seconds))
        result.ratios[name] = exponent(medians)
        result.ratios[f"{name}_at_end"] = exponent(dict(sorted(medians.items())[-2:]))
        shown = ", ".join(f"{value:,.0f}: {seconds:.3f} s" for value, seconds in medians.items())
        console.print(
            f"{name}: exponent {result.ratios[name]:.2f}, at the end {result.ratios[f'{name}_at_end']:.2f} ({shown})"
        )
    if projection:
        for name, number in projected(turns).items():
            result.values[f"projection/{name}", "ViT-B"] = [number] * turns
            console.print(f"projection {name}: {number:.4g}")
    return result


def exponent(cost: Mapping[float, float]) -> float:
    """Slope of log cost over log size, by least squares."""
    slope, _ = np.polyfit(np.log([*cost]), np.log([*cost.values()]), 1)
    return float(slope)


def projected(turns: int) -> dict[str, float]:
    """Cost of ViT-B at 20 sites of 50,000 patients."""
    run = organs_run("base", _PATIENTS_PER_STEP, turns + 1, stream=_VOLUME)
    step = float(np.median(in_turns({"step": _stepping(run)}, turns)["step"]))
    manifest = trained_manifest(describe_model(run), run.sharing)
    groups = {group: manifest.size(group) for group in manifest.groups}
    (up,) = run_cost.bytes_up(groups, {"site": [*run.streams]}).values()
    steps = run_cost.steps_of(PATIENTS // 10, BATCH)
    core_hours = run_cost.round_seconds(step / _PATIENTS_PER_STEP * BATCH, steps) / 3600
    return {
        "parameters": float(sum(groups.values())),
        "megabytes_up": up / 1e6,
        "gigabytes_round": 2 * SITES * up / 1e9,
        "site_link_seconds": run_cost.link_seconds(2 * up, MEGABITS["site"]),
        "coordinator_link_seconds": run_cost.link_seconds(2 * SITES * up, MEGABITS["coordinator"]),
        "core_seconds_per_patient": step / _PATIENTS_PER_STEP,
        "steps_per_round": float(steps),
        "core_hours_per_round": core_hours,
        "server_gib": run_cost.server_memory_bytes(sum(groups.values())) / 2**30,
        "step_gib": sizes_of(organs_run("base", BATCH, 1, stream=_VOLUME)).step_bytes / 2**30,
        "images_tb": run_cost.image_bytes(run.streams, PATIENTS) / 1e12,
        "images_tb_uint8": run_cost.image_bytes(run.streams, PATIENTS, per_voxel=1) / 1e12,
        "features_tb": run_cost.feature_bytes(run, PATIENTS) / 1e12,
        "private_state_gib": sizes_of(run).state_bytes / 2**30,
    }
