"""Cost of a private step: one with clipped per-patient gradients and noise over a plain one.

    dense   ViT of 12 blocks, 192 wide, 32 images of 196 tokens
    dex     its MLPs are 8 experts of hidden width 2 x 192, 2 active, and a director; 16 images

A step is teacher, masks, targets, forward, gradients, clipping, noise, optimiser and teacher's update; latent
self-distillation without running statistics, random masks. The batch is the same in both: the sample rate is 1. The
arms take turns in one process on one thread, and a ratio is the median over the turns, in CPU time. Memory is the
growth of a fresh process's peak during three steps, in a process per arm (Linux).
"""

import multiprocessing
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console

from panfm.config import RunConfig, parse_run
from panfm.privacy.private_step import PrivateGradient
from panfm.training.trainer import Trainer
from simulations.bench._steps import in_turns, noise_store, step_seconds
from simulations.harness import bench
from simulations.study_result import StudyResult

_RUN = """
name = "dp-step"
streams.chest-xray = { shape = [224, 224], patch = [16, 16] }
objective.standardise = false
masking.policy = "random"
train.rounds = 1
"""
_PRIVACY = """
[patient-dp]
epsilon = 8.0
delta = 1e-3
public-subjects = 32
noise-multiplier = 1.5
sample-rate = 1.0
"""
_MODELS = {
    "dense": '[model]\nsize = "tiny"\n',
    "dex": '[model]\nsize = "tiny"\nbackbone = "director-experts"\nhidden-multiple = 2\n'
    "[model.experts]\nbalance-weight = [0.0, 0.0]\n",
}
_BATCH = {"dense": 32, "dex": 16}


@bench
def main(
    turns: Annotated[int, typer.Option(min=1, help="Steps per arm, after one to warm up.")] = 7,
    shrink: Annotated[int, typer.Option(min=1, max=16, help="Divide the number of images by this.")] = 1,
) -> StudyResult:
    """CPU seconds and memory of a private step over a plain one."""
    torch.set_num_threads(1)
    console = Console(soft_wrap=True, highlight=False)
    batch = {kind: size // shrink for kind, size in _BATCH.items()}
    result = StudyResult("dp-step", {"turns": turns, "batch": batch, "models": _MODELS}, unit="s")
    for kind in _MODELS:
        for arm, values in measure(kind, batch[kind], turns).items():
            result.values[f"{kind}/step", arm] = values
        result.ratios[kind] = result.median_ratio(f"{kind}/step", "private", "plain")
        grown = {arm: peak_growth(kind, batch[kind], arm) for arm in ("plain", "private")}
        result.ratios[f"{kind}_memory"] = grown["private"] / grown["plain"]
        megabytes = " / ".join(f"{grown[arm] / 2**20:.0f}" for arm in ("private", "plain"))
        console.print(
            f"{kind}: time {result.ratios[kind]:.3f}, memory {result.ratios[f'{kind}_memory']:.3f} ({megabytes} MB)"
        )
    return result


def measure(kind: str, batch: int, turns: int) -> dict[str, list[float]]:
    """CPU seconds of `turns` steps of either arm, in turn order."""
    arms = {arm: _Arm(kind, batch, private=arm == "private").take_step for arm in ("plain", "private")}
    return in_turns(arms, turns)


class _Arm:
    """One trainer that takes steps on one batch."""

    def __init__(self, kind: str, batch: int, *, private: bool) -> None:
        self.trainer = Trainer(run := _run(kind, batch, private=private))
        self.indices = np.arange(batch)
        self.store = noise_store(run.streams, run.seed, batch, "dp-step")
        self.features = self.trainer.patch_features(self.store)

    def take_step(self, _: int = 0) -> float:
        """CPU seconds of one step, without what a round does once at its end."""
        if not self.trainer.run.patient_dp:
            return step_seconds(self.trainer, self.store)
        begin = time.process_time()
        self.trainer.step(PrivateGradient(self.trainer, self.features, self.indices), 0)
        return time.process_time() - begin


def peak_growth(kind: str, batch: int, arm: str) -> float:
    """Bytes by which three steps raise the peak of a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_growth, (kind, batch, arm))


def _peak_growth(kind: str, batch: int, arm: str) -> float:
    torch.set_num_threads(1)
    ready = _Arm(kind, batch, private=arm == "private")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, which a child inherits, is forgotten
    before = _status_bytes("VmRSS")
    for _ in range(3):
        ready.take_step()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> float:
    """A number of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _run(kind: str, batch: int, *, private: bool) -> RunConfig:
    train = f"train.batch-size = {batch}\n"
    return parse_run(_RUN + train + _MODELS[kind] + (_PRIVACY if private else ""))
