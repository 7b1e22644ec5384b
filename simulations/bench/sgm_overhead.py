"""Cost of saliency-guided masking: one training step with it over one with random masking.

Random, sgm by `attention` and sgm by `value` take turns, step by step, in one process on one thread, at the same mask
ratio and on the same batches; the ratio is the median over the turns of (guided step / random step of the same turn),
in CPU time.
"""

from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console

from panfm.config import RunConfig
from panfm.training.trainer import Trainer
from simulations.bench._steps import in_turns, noise_store, step_seconds
from simulations.cohorts.prepare import load_simulation
from simulations.harness import TRANSIENT, Experiment, bench
from simulations.study_result import StudyResult

ARMS: dict[str, dict[str, object]] = {
    "random": {"policy": "random"},
    "attention": {"policy": "sgm", "saliency": "attention", "warmup_steps": 1},
    "value": {"policy": "sgm", "saliency": "value", "warmup_steps": 1},
}
SIZES = ("tiny", "small")
_NUM_SUBJECTS = 32


@bench
def main(
    turns: Annotated[int, typer.Option(min=1, help="Steps per arm and size, after one to warm up.")] = 100,
    experiment: Experiment = TRANSIENT,
) -> StudyResult:
    """CPU seconds of a step with saliency-guided masking over one with random masking."""
    torch.set_num_threads(1)
    console = Console(soft_wrap=True, highlight=False)
    run = load_simulation(experiment)
    result = StudyResult("sgm-overhead", {"experiment": str(experiment), "turns": turns, "batch-size": 8}, unit="s")
    for size in SIZES:
        console.print(f"{size}: {turns} turns")
        for arm, values in measure(run, size, turns=turns).items():
            result.values[f"{size}/step", arm] = values
        for arm in ("attention", "value"):
            result.ratios[f"{size}/{arm}"] = result.median_ratio(f"{size}/step", arm, "random")
            console.print(f"{size} {arm}: {result.ratios[f'{size}/{arm}']:.3f} of a random-masking step")
    for arm in ("attention", "value"):
        result.ratios[arm] = max(result.ratios[f"{size}/{arm}"] for size in SIZES)
    return result


def measure(run: RunConfig, size: str, *, turns: int) -> dict[str, list[float]]:
    """CPU seconds of `turns` steps of every arm, in turn order."""
    store = noise_store(run.streams, run.seed, _NUM_SUBJECTS, "sgm-overhead")
    arms = {arm: partial(step_seconds, _trainer(run, size, settings, turns), store) for arm, settings in ARMS.items()}
    return in_turns(arms, turns)


def _trainer(run: RunConfig, size: str, masking: dict[str, object], turns: int) -> Trainer:
    train = run.train.model_copy(update={"rounds": 1, "local_steps": turns + 1, "batch_size": 8})
    changed = {
        "model": run.model.model_copy(update={"size": size}),
        "masking": run.masking.model_copy(update=masking),
        "train": train,
    }
    return Trainer(run.model_copy(update=changed))
