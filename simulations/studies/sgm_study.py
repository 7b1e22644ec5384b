"""Gain of saliency-guided masking over other policies, by number of steps, by phantom and by recipe of training.

Three phantoms (`transient` and `lasting` dominance, `shortcut`), three budgets, seven masking arms at one mask ratio,
and references: the untrained model and plain organ statistics, and, as upper bounds, the labels' own score of the true
factors (`oracle`) and a linear probe of these factors (`latents`). Frozen embeddings are read by linear probes fitted
on the training subjects as they were scanned, and tested on complete subjects and on the same subjects with organs
removed. Metric names begin with the phantom: `transient/auc`, `lasting/auc_no_dominant`, ...

Recipes are `plain` (objective `latent`, the same input constants for all streams, images as they are), and others with
inputs centred and scaled per stream, a teacher tied to the run's length, and two augmented views or one. The objective
`views` is not among them: its batches show one stream, so that guided masks are random ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
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
from panfm.evaluate.input_sums import InputSums, with_constants
from panfm.evaluate.linear_probe import auc_per_label, fit_classifiers
from panfm.evaluate.probe_cohort import FeaturesOf, missing_grid
from panfm.evaluate.representation import saliency_entropy
from panfm.evaluate.statistics import StatisticsReference, measure_store
from panfm.models import PanModel
from panfm.training.monitors import effective_rank
from panfm.training.saliency import stream_shares
from panfm.training.trainer import Trainer
from simulations.alone import train_round
from simulations.cohorts.phantom_draw import Phantom
from simulations.cohorts.phantom_labels import LABELS, score
from simulations.cohorts.prepare import load_simulation
from simulations.harness import TRANSIENT, ArmJob, CohortJob, StudyOptions, chosen_arms, run_arms, study
from simulations.studies._cohorts import FrozenReader
from simulations.studies._phantoms import Cohort, open_draw, render_draw
from simulations.studies._tables import print_study
from simulations.study_result import StudyResult, Target

PHANTOMS = ("transient", "lasting", "shortcut")
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
_SCALED = ("train.batch-size=32", 'train.teacher-momentum="auto"', "augment={ blur = 0.0, noise = 0.0 }")
RECIPES: dict[str, tuple[str, ...]] = {
    "plain": ("train.batch-size=64",),
    "latent": _SCALED,
    "dino": (*_SCALED, 'objective={ name = "dino", views = 2 }'),
    "view-regression": (*_SCALED, 'objective={ name = "view-regression" }'),
}
"""Changes of the run, as `--set` would make them. All recipes but `plain` also scale the inputs of each stream. They
leave blur and noise out, which would take half of the time of a step."""
_MEASURED = 256
"""Patients whose images give the constants of scaled inputs."""
BOUNDS = ("oracle", "latents")
REFERENCES = ("untrained", "statistics", *BOUNDS)
ARMS = (*MASKING, *REFERENCES)
SHOWN = ("auc", "auc_weak", "auc_no_dominant", "saliency_entropy")


Arms = Annotated[str, typer.Option(help="Only these arms, with commas between; random is run beside any policy.")]
Phantoms = Annotated[str, typer.Option(help=f"Only these phantoms, with commas between: {', '.join(PHANTOMS)}.")]
Recipe = Annotated[str, typer.Option(help=f"How all arms are trained: {', '.join(RECIPES)}.")]

_ALL = ",".join(ARMS)


@study(seeds=5, draws=3, budgets=STEPS, unit="steps")
def main(
    options: StudyOptions,
    budget: str,
    arms: Arms = _ALL,
    phantoms: Phantoms = "transient,lasting",
    recipe: Recipe = "plain",
) -> StudyResult:
    """Masking policies on phantoms: what saliency-guided masking gains, and for how long."""
    if recipe not in RECIPES:
        raise typer.BadParameter(f"{recipe}: expected one of {', '.join(RECIPES)}", param_hint="--recipe")
    chosen = chosen_arms(phantoms, PHANTOMS, "--phantoms")
    asked = chosen_arms(arms, ARMS)
    compared = chosen_arms(f"random,{arms}", ARMS) if {*asked} & {*MASKING} else asked
    result = run(options, budget, compared, chosen, recipe)
    show(result)
    return result


def run(
    options: StudyOptions, budget: str, arms: Sequence[str], phantoms: Sequence[str], recipe: str = "plain"
) -> StudyResult:
    """Run the study, with some of the arms on some of the phantoms."""
    steps = STEPS[budget]
    config = {"budget": budget, "steps": steps, "pairs": options.pairs(), "recipe": recipe, "phantoms": [*phantoms]}
    result = StudyResult("sgm", config | _settings(recipe))
    jobs = [f"{recipe}/{phantom}/{arm}" for phantom in phantoms for arm in arms]
    write = partial(write_draw, phantoms=tuple(phantoms), with_images=not {*arms} <= {*BOUNDS})
    for job, measured in run_arms(options, jobs, steps, write, measure):
        _, phantom, arm = job.arm.split("/")
        result.add(arm, {f"{phantom}/{metric}": value for metric, value in measured.items()})
    result.ratios.update(_gains(result))
    result.targets += targets(result, budget) if "sgm" in arms else []
    return result


def show(result: StudyResult) -> None:
    """Print a table per phantom: mean of every arm, and its gain over random masking with the share of pairs won."""
    tables = []
    for phantom in phantoms_of(result):
        tables.append(
            Table("arm", title=f"{phantom}, {result.config['steps']} steps, {len(result.config['pairs'])} pairs")
        )
        for metric in SHOWN:
            tables[-1].add_column(metric, justify="right")
        for arm in (arm for arm in ARMS if (f"{phantom}/auc", arm) in result.values):
            tables[-1].add_row(arm, *(_cell(result, f"{phantom}/{metric}", arm) for metric in SHOWN))
    print_study(result, *tables, with_ratios=False)


def phantoms_of(result: StudyResult) -> list[str]:
    """The phantoms that were measured."""
    measured = {metric.partition("/")[0] for metric, _ in result.values}
    return [phantom for phantom in PHANTOMS if phantom in measured]


def _cell(result: StudyResult, metric: str, arm: str) -> str:
    if (metric, arm) not in result.values:
        return "-"
    mean = f"{result.mean(metric, arm):.3f}"
    if arm == "random" or (metric, "random") not in result.values:
        return mean
    gain = np.mean(result.gain(metric, arm, "random"))
    return f"{mean} ({gain:+.3f}, {result.share_won(metric, arm, 'random'):.0%})"


def study_run(seed: int, arm: str, steps: int, recipe: str = "plain") -> RunConfig:
    """The run of one arm: the model and streams of `transient`, one place, one round."""
    base = load_simulation(TRANSIENT, RECIPES[recipe])
    masking = base.masking.model_copy(update=MASKING.get(arm, {}))
    train = base.train.model_copy(update={"rounds": 1, "local_steps": steps})
    return base.model_copy(update={"seed": seed, "masking": masking, "train": train})


def scaled(run: RunConfig, store: ImageStore) -> RunConfig:
    """The same run, with constants that centre and scale what the tokenizer of each stream reads in a store."""
    some = np.arange(min(_MEASURED, len(store.subjects)))
    constants = {
        name: InputSums.of(store, name, stream, run.model.tokenizer, some).constants()
        for name, stream in run.streams.items()
    }
    return with_constants(run, constants)


def write_draw(job: CohortJob, phantoms: Sequence[str] = PHANTOMS, *, with_images: bool = True) -> Path:
    """Render the phantoms of one draw, each under its own name; returns their folder. The bounds need labels alone."""
    run = study_run(0, "random", 1)
    for phantom in phantoms:
        streams = run.streams if with_images else {}
        render_draw(job.folder / phantom, Phantom(phantom, job.draw), streams, run.organs)
    return job.folder


def measure(job: ArmJob) -> dict[str, float]:
    """Train one arm, `<recipe>/<phantom>/<arm>`, and measure it."""
    recipe, phantom, arm = job.arm.split("/")
    run = study_run(job.seed, arm, job.length, recipe)
    if arm in BOUNDS:
        return _measure_bound(arm, Phantom(phantom, job.draw), open_draw(job.cohort / phantom, ()), run)
    cohort = open_draw(job.cohort / phantom, run.streams)
    if recipe != "plain":
        run = scaled(run, cohort.train)
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


def _measure_bound(arm: str, phantom: Phantom, cohort: Cohort, run: RunConfig) -> dict[str, float]:
    """AUC on the test patients of what no image shows whole: the factors that labels and images are drawn from."""
    weak = np.array([label.weak for label in LABELS.values()])
    test = phantom.draw("test", len(cohort.test.subjects), run.organs, complete=True).latents
    if arm == "oracle":
        scores = np.stack([score(label, test) for label in LABELS.values()], axis=1)
    else:
        fit = phantom.draw("train", len(cohort.train.subjects), run.organs).latents
        scores = fit_classifiers(fit, cohort.train_labels, list(LABELS)).score(test)
    aucs = auc_per_label(scores, cohort.test_labels, np.ones((1, len(test))))[0]
    return {"auc": float(aucs.mean()), "auc_weak": float(aucs[weak].mean())}


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
    for name in (f"{phantom}/{metric}" for phantom in phantoms_of(result) for metric in SHOWN):
        arms = [arm for arm in ARMS if (name, arm) in result.values]
        for arm in arms[1:] if "random" in arms else ():
            gains[f"{name}/{arm}-minus-random"] = float(np.mean(result.gain(name, arm, "random")))
            gains[f"{name}/{arm}-wins"] = result.share_won(name, arm, "random")
    return gains


def targets(result: StudyResult, budget: str) -> list[Target]:
    """Targets of `sgm` at a budget. `long` compares with `statistics` where that arm was run."""

    def ahead(metric: str, least: float, baseline: str = "random") -> Target:
        gain = float(np.mean(result.gain(metric, "sgm", baseline)))
        return Target(f"{budget}: {metric}, sgm minus {baseline}", gain, least)

    def won(metric: str) -> Target:
        share = result.share_won(metric, "sgm", "random")
        return Target(f"{budget}: {metric}, share of pairs that sgm wins", share, 0.8)

    phantoms = phantoms_of(result)
    targets = [ahead(f"{phantom}/saliency_entropy", 0.0) for phantom in phantoms]
    if budget == "short":
        for phantom in phantoms:
            for metric, least in (("auc", 0.02), ("auc_no_dominant", 0.03)):
                targets += [ahead(f"{phantom}/{metric}", least), won(f"{phantom}/{metric}")]
    if budget == "long":
        of_phantom = {"transient": ("auc", -0.003)}
        for phantom in phantoms:
            metric, least = of_phantom.get(phantom, ("auc_no_dominant", 0.01))
            targets.append(ahead(f"{phantom}/{metric}", least))
        against = [phantom for phantom in phantoms if (f"{phantom}/auc", "statistics") in result.values]
        targets += [ahead(f"{phantom}/auc", 0.0, "statistics") for phantom in against]
    return targets


def _settings(recipe: str) -> dict[str, Any]:
    described = study_run(0, "sgm", 1, recipe).model_dump(mode="json", by_alias=True)
    return {"arms": MASKING} | {name: described[name] for name in ("masking", "model", "objective", "train")}
