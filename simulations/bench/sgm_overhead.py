"""Cost of saliency-guided masking: one training step with it over one with random masking.

Random, sgm by `attention` and sgm by `value` take turns, step by step, in one process on one thread, at the same mask
ratio and on the same batches; the ratio is the median over the turns of (guided step / random step of the same turn),
in CPU time.
"""

import time
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console

from panfm.config import RunConfig
from panfm.data.store import ImageStore
from panfm.seeds import numpy_generator
from panfm.training.trainer import Trainer
from simulations.cohorts.prepare import load_simulation
from simulations.harness import QUICKSTART, Experiment, JsonFile, StudyResult, check_writable

ARMS: dict[str, dict[str, object]] = {
    "random": {"policy": "random"},
    "attention": {"policy": "sgm", "saliency": "attention", "warmup_steps": 1},
    "value": {"policy": "sgm", "saliency": "value", "warmup_steps": 1},
}
SIZES = ("tiny", "small")
_NUM_SUBJECTS = 32


def main(
    json: JsonFile = None,
    turns: Annotated[int, typer.Option(min=1, help="Steps per arm and size, after one to warm up.")] = 100,
    experiment: Experiment = QUICKSTART,
) -> None:
    """CPU seconds of a step with saliency-guided masking over one with random masking."""
    torch.set_num_threads(1)
    check_writable(json)
    console = Console(soft_wrap=True, highlight=False)
    run = load_simulation(experiment)
    result = StudyResult("sgm-overhead", {"experiment": str(experiment), "turns": turns, "batch-size": 8}, unit="s")
    for size in SIZES:
        console.print(f"{size}: {turns} turns")
        seconds = measure(run, size, turns=turns)
        for arm, values in seconds.items():
            result.values[f"{size}/step", arm] = values
        for arm in ("attention", "value"):
            result.ratios[f"{size}/{arm}"] = paired_ratio(seconds, arm)
            console.print(f"{size} {arm}: {result.ratios[f'{size}/{arm}']:.3f} of a random-masking step")
    for arm in ("attention", "value"):
        result.ratios[arm] = max(result.ratios[f"{size}/{arm}"] for size in SIZES)
    if json:
        result.write(json)


def measure(run: RunConfig, size: str, *, turns: int) -> dict[str, list[float]]:
    """CPU seconds of `turns` steps of every arm, in turn order."""
    store = _random_store(run)
    trainers = {arm: _trainer(run, size, settings, turns) for arm, settings in ARMS.items()}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    order = list(ARMS)
    for turn in range(turns + 1):
        for arm in order[turn % 3 :] + order[: turn % 3]:
            taken = _one_step(trainers[arm], store, turn)
            if turn:
                seconds[arm].append(taken)
    return seconds


def _one_step(trainer: Trainer, store: ImageStore, turn: int) -> float:
    """CPU seconds of one step, without the work at the end of a round."""
    ended: list[float] = []
    begin = time.process_time()
    trainer.train(
        store,
        np.arange(_NUM_SUBJECTS),
        first_step=turn,
        num_steps=1,
        site="bench",
        round_number=turn,
        on_step=lambda *_: ended.append(time.process_time()),
    )
    return ended[0] - begin


def paired_ratio(seconds: dict[str, list[float]], arm: str) -> float:
    """Median over the turns of this arm's step over the random step of the same turn."""
    return float(np.median(np.asarray(seconds[arm]) / np.asarray(seconds["random"])))


def _trainer(run: RunConfig, size: str, masking: dict[str, object], turns: int) -> Trainer:
    train = run.train.model_copy(update={"rounds": 1, "local_steps": turns + 1, "batch_size": 8})
    changed = {
        "model": run.model.model_copy(update={"size": size}),
        "masking": run.masking.model_copy(update=masking),
        "train": train,
    }
    return Trainer(run.model_copy(update=changed))


def _random_store(run: RunConfig) -> ImageStore:
    """Complete subjects with images of noise: the cost does not depend on their content."""
    random = numpy_generator(run.seed, "sgm-overhead")
    images = {
        name: random.random((_NUM_SUBJECTS, stream.channels, *stream.shape), dtype=np.float32)
        for name, stream in run.streams.items()
    }
    rows = {name: np.arange(_NUM_SUBJECTS) for name in images}
    subjects = tuple(str(index) for index in range(_NUM_SUBJECTS))
    return ImageStore(subjects, ("train",) * _NUM_SUBJECTS, images, rows)
