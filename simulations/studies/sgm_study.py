"""Gain of saliency-guided masking over other policies, by number of steps and by phantom.

Two phantoms (`transient` and `lasting` dominance), three budgets, seven masking arms at one mask ratio, and two
references: the untrained model and plain organ statistics. Frozen embeddings are read by linear probes fitted on the
training subjects as they were scanned, and tested on complete subjects and on the same subjects with organs removed.
Metric names begin with the preset: `transient/auc`, `lasting/auc_no_dominant`, ...
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.table import Table

from panfm.config import RunConfig, StreamConfig
from panfm.data.store import ImageStore
from panfm.evaluate.embed import embed_store
from panfm.evaluate.linear_probe import auc_per_label, fit_classifiers
from panfm.evaluate.probe_cohort import FeaturesOf, missing_grid
from panfm.evaluate.representation import effective_rank, saliency_entropy
from panfm.evaluate.statistics import StatisticsReference, measure_store
from panfm.models import PanModel
from panfm.training.saliency import stream_shares
from panfm.training.trainer import Trainer
from simulations.alone import train_round
from simulations.cohorts.phantom_draw import Phantom
from simulations.cohorts.phantom_labels import LABELS
from simulations.cohorts.prepare import load_simulation
from simulations.harness import TRANSIENT, ArmJob, CohortJob, StudyOptions, chosen_arms, run_arms, study
from simulations.studies._cohorts import FrozenReader
from simulations.studies._phantoms import Cohort, open_draw, render_draw
from simulations.studies._tables import print_study
from simulations.study_result import StudyResult, Target

PRESETS = ("transient", "lasting")
STEPS = {"short": 500, "medium": 3000, "long": 8000}
_CONSTANT = {"settle_steps": 10**9, "limit": 20.0}
MASKING: dict[str, dict[str, Any]] = {
    "random": {"policy": "random"},
    "organ": {"policy": "organ"},
    "sgm-attention": {"policy": "sgm", "saliency": "attention", **_CONSTANT},
    "sgm-value": {"policy": "sgm", "saliency": "value", **_CONSTANT},
    "sgm": {"policy": "sgm"},
    "inverse": {"policy": "inverse", **_CONSTANT},
    "static": {"policy": "static"},
}
"""What sets an arm apart from the default masking, which is `sgm`. `sgm-attention`, `sgm-value` and `inverse` keep
their full strength to the end."""
REFERENCES = ("untrained", "statistics")
ARMS = (*MASKING, *REFERENCES)
SHOWN = ("auc", "auc_weak", "auc_no_dominant", "saliency_entropy")
_BATCH_SIZE = 64


Arms = Annotated[str, typer.Option(help="Only these arms, with commas between; random is always run.")]

_ALL = ",".join(ARMS)


@study(seeds=5, draws=3, budgets=STEPS, unit="steps")
def main(options: StudyOptions, budget: str, arms: Arms = _ALL) -> StudyResult:
    """Masking policies on two phantoms: what saliency-guided masking gains, and for how long."""
    result = run(options, budget, chosen_arms(f"random,{arms}", ARMS))
    show(result)
    return result


def run(options: StudyOptions, budget: str, arms: Sequence[str]) -> StudyResult:
    """Run the study, with some of the arms."""
    steps = STEPS[budget]
    result = StudyResult("sgm", {"budget": budget, "steps": steps, "pairs": options.pairs(), **_settings()})
    jobs = [f"{preset}/{arm}" for preset in PRESETS for arm in arms]
    for job, measured in run_arms(options, jobs, steps, write_draw, measure):
        preset, _, arm = job.arm.partition("/")
        result.add(arm, {f"{preset}/{metric}": value for metric, value in measured.items()})
    result.ratios.update(_gains(result))
    result.targets += targets(result, budget) if "sgm" in arms else []
    return result


def show(result: StudyResult) -> None:
    """Print a table per preset: mean of every arm, and its gain over random masking with the share of pairs won."""
    tables = []
    for preset in PRESETS:
        tables.append(
            Table("arm", title=f"{preset}, {result.config['steps']} steps, {len(result.config['pairs'])} pairs")
        )
        for metric in SHOWN:
            tables[-1].add_column(metric, justify="right")
        for arm in ARMS:
            tables[-1].add_row(arm, *(_cell(result, f"{preset}/{metric}", arm) for metric in SHOWN))
    print_study(result, *tables, with_ratios=False)


def _cell(result: StudyResult, metric: str, arm: str) -> str:
    if (metric, arm) not in result.values:
        return "-"
    mean = f"{result.mean(metric, arm):.3f}"
    if arm == "random" or (metric, "random") not in result.values:
        return mean
    gain = np.mean(result.gain(metric, arm, "random"))
    return f"{mean} ({gain:+.3f}, {result.share_won(metric, arm, 'random'):.0%})"


def study_run(seed: int, arm: str, steps: int) -> RunConfig:
    """The run of one arm: the model and streams of `transient`, one place, one round."""
    base = load_simulation(TRANSIENT)
    masking = base.masking.model_copy(update=MASKING.get(arm, {}))
    train = base.train.model_copy(update={"rounds": 1, "local_steps": steps, "batch_size": _BATCH_SIZE})
    return base.model_copy(update={"seed": seed, "masking": masking, "train": train})


def write_draw(job: CohortJob) -> Path:
    """Render both phantoms of one draw, each under its preset's name; returns their folder."""
    run = study_run(0, "random", 1)
    for preset in PRESETS:
        render_draw(job.folder / preset, Phantom(preset, job.draw), run.streams, run.organs)
    return job.folder


def measure(job: ArmJob) -> dict[str, float]:
    """Train one arm, `<preset>/<arm>`, and measure it."""
    preset, _, arm = job.arm.partition("/")
    run = study_run(job.seed, arm, job.length)
    cohort = open_draw(job.cohort / preset, run.streams)
    if arm == "statistics":
        return _probe(cohort, run, *_statistics_features(cohort, run.streams), draw=job.draw)
    trainer = Trainer(run)
    if arm != "untrained":
        train_round(trainer, cohort.train, "study", 1)
    return measure_trainer(trainer, cohort, draw=job.draw)


def measure_trainer(trainer: Trainer, cohort: Cohort, *, draw: int) -> dict[str, float]:
    """All metrics of a trainer's frozen student."""
    model = trainer.model
    reader = FrozenReader(model, lambda batch: model.encode(batch).cls)  # of patch features, which are computed once
    train, test = trainer.patch_features(cohort.train), trainer.patch_features(cohort.test)

    def features_of(streams: Iterable[str]) -> NDArray[np.float32]:
        return embed_store(reader, test, np.arange(len(test.subjects)), tuple(streams))

    fit = embed_store(reader, train, np.arange(len(train.subjects)))
    measured = _probe(cohort, trainer.run, fit, features_of, draw=draw)
    return measured | {"saliency_entropy": _saliency_entropy(model, test)}


def _statistics_features(cohort: Cohort, streams: Mapping[str, StreamConfig]) -> tuple[NDArray[np.float32], FeaturesOf]:
    train, test = (measure_store(store, streams) for store in (cohort.train, cohort.test))
    fit, everyone = np.arange(len(cohort.train.subjects)), np.arange(len(cohort.test.subjects))
    reference = StatisticsReference.fit([(train, fit)])
    return reference.features(train, fit), lambda names: reference.features(test, everyone, names)


def _probe(
    cohort: Cohort, run: RunConfig, fit: NDArray[np.float32], features_of: FeaturesOf, *, draw: int
) -> dict[str, float]:
    names, weak = list(LABELS), np.array([label.weak for label in LABELS.values()])
    probe = fit_classifiers(fit, cohort.train_labels, names)
    once = np.ones((1, len(cohort.test_labels)))

    def per_label(features: NDArray[np.floating]) -> NDArray[np.float64]:
        return auc_per_label(probe.score(features), cohort.test_labels, once)[0]

    complete = features_of(tuple(run.streams))
    grid = missing_grid(
        features_of,
        lambda features: float(per_label(features).mean()),
        tuple(run.streams),
        dominant=run.masking.static_organs,
        draws=run.probe.missing_draws,
        seed=draw,
    )
    return {**grid, "auc_weak": float(per_label(complete)[weak].mean()), "effective_rank": effective_rank(complete)}


def _saliency_entropy(model: PanModel, features: ImageStore) -> float:
    """Entropy of the mean `value` saliency over complete subjects, in every arm alike."""
    shares = []
    with torch.inference_mode():
        for start in range(0, len(features.subjects), 256):
            batch = features.batch(np.arange(start, min(start + 256, len(features.subjects))))
            encoded = model.encode(batch, saliency="value")
            assert encoded.saliency is not None
            shares.append(
                stream_shares(encoded.saliency, encoded.layout, model.stream_of_patch, len(model.stream_names))
            )
    return saliency_entropy(torch.cat(shares).mean(dim=0).tolist())


def _gains(result: StudyResult) -> dict[str, float]:
    """Mean gain over random masking, and the share of pairs in which it is positive."""
    gains: dict[str, float] = {}
    for preset in PRESETS:
        for metric in SHOWN:
            for arm in ARMS:
                if arm == "random" or (f"{preset}/{metric}", arm) not in result.values:
                    continue
                gain = result.gain(f"{preset}/{metric}", arm, "random")
                gains[f"{preset}/{metric}/{arm}-minus-random"] = float(np.mean(gain))
                gains[f"{preset}/{metric}/{arm}-wins"] = result.share_won(f"{preset}/{metric}", arm, "random")
    return gains


def targets(result: StudyResult, budget: str) -> list[Target]:
    """Targets of `sgm` at a budget. `long` compares with `statistics` where that arm was run."""

    def ahead(metric: str, least: float, baseline: str = "random") -> Target:
        gain = float(np.mean(result.gain(metric, "sgm", baseline)))
        return Target(f"{budget}: {metric}, sgm minus {baseline}", gain, least)

    def won(metric: str) -> Target:
        share = result.share_won(metric, "sgm", "random")
        return Target(f"{budget}: {metric}, share of pairs that sgm wins", share, 0.8)

    targets = [ahead(f"{preset}/saliency_entropy", 0.0) for preset in PRESETS]
    if budget == "short":
        for preset in PRESETS:
            for metric, least in (("auc", 0.02), ("auc_no_dominant", 0.03)):
                targets += [ahead(f"{preset}/{metric}", least), won(f"{preset}/{metric}")]
    if budget == "long":
        targets += [ahead("transient/auc", -0.003), ahead("lasting/auc_no_dominant", 0.01)]
        against = [preset for preset in PRESETS if (f"{preset}/auc", "statistics") in result.values]
        targets += [ahead(f"{preset}/auc", 0.0, "statistics") for preset in against]
    return targets


def _settings() -> dict[str, Any]:
    described = study_run(0, "sgm", 1).model_dump(mode="json", by_alias=True)
    return {"arms": MASKING} | {name: described[name] for name in ("masking", "model", "objective", "train")}
