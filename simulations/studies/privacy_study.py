"""Cost of privacy, and attacks on it: epsilon 2, 8 and infinity, from scratch and from a public model.

Five phantom hospitals with unequal organs, as many steps over the same patients in every arm:

    cold-<epsilon>   from the seed's parameters; all of them are trained
    warm-<epsilon>   from a public model; norms, biases, embeddings and queries are trained (`train.parts`)
    untrained        what `cold` starts from
    public           what `warm` starts from: the model of `transient`, trained in one place on another phantom draw
    warm-ordinary    from the public model, all parameters, by the ordinary loop

`inf` is the private loop with the same Poisson samples, steps and trained parameters, a clip norm that nobody reaches
and noise that rounding would hide. `warm-ordinary` takes as many steps over shuffled batches of the size that a Poisson
sample has on average, and clips the batch's gradient as every ordinary run does. An epsilon is worth something only
where its arm is ahead of what it starts from, so `untrained` and `public` stand beside the rest.

    auc              of the frozen features, over all labels and all held-out subjects, as a run probes it
    mia_auc          membership inference against the start of training: trained patients, and as many of the same sites
    psnr, psnr_grey  dB, means over patients: what comes out of one patient's gradient at the final model, with the
                     clipping and noise that its site adds, and the best single grey instead

The gradients of `warm` hold no part that the closed-form inversion needs: there `psnr` is `psnr_grey` by construction.
"""

import csv
import tempfile
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import safetensors.torch
from rich.console import Console
from rich.table import Table

from panfm.config import RunConfig, dump_toml, site_folders
from panfm.data.cache import open_store
from panfm.data.store import ImageStore
from panfm.models import PanModel, build_model
from panfm.models.warm_start import start_model
from panfm.outputs import write_table
from panfm.privacy.audit_inversion import Attacked
from panfm.privacy.audit_membership import Place, audit_membership
from panfm.privacy.mechanisms import planned
from panfm.privacy.statement import noise_for
from simulations.alone import train_alone
from simulations.cohorts.opened import OpenedCohort, join_stores
from simulations.cohorts.prepare import cohort_of, load_simulation
from simulations.harness import TRANSIENT, CohortJob, StudyOptions, run_jobs, study
from simulations.studies._cohorts import resized
from simulations.studies._federations import RunJob, federate_on_copies
from simulations.studies._tables import mean_sd, print_study
from simulations.study_result import StudyResult, Target

EPSILONS = {"inf": None, "8": 8.0, "2": 2.0}
ARMS = tuple(f"{start}-{epsilon}" for start in ("cold", "warm") for epsilon in EPSILONS)
REFERENCES = ("untrained", "public", "warm-ordinary")
METRICS = ("auc", "mia_auc", "psnr", "psnr_grey")
_PRIVATE = TRANSIENT.with_name("private.toml")
_PUBLIC_DRAW = 1000
"""Public patients are of the draw that lies so far ahead."""
_MEMBERS, _HOLDOUT, _ATTACKED, _MASKS = 100, 400, 10, 4
_ROUNDS, _LOCAL_STEPS, _RATE, _DELTA = 2, 10, 0.5, 1e-3
_PUBLIC_ROUNDS, _PUBLIC_STEPS, _PUBLIC_BATCH = 8, 100, 64


@dataclass(frozen=True)
class PublicJob:
    """The training of one public model."""

    draw: int
    seed: int
    cohort: Path
    folder: Path

    def __str__(self) -> str:
        return f"draw {self.draw}, seed {self.seed}, public model"


@study(seeds=3)
def main(options: StudyOptions) -> StudyResult:
    """AUC, membership inference and inversion at epsilon 2, 8 and infinity, from scratch and from a public model."""
    result = run(options)
    show(result)
    return result


def run(options: StudyOptions) -> StudyResult:
    """Run the study."""
    with tempfile.TemporaryDirectory() as scratch:
        cohorts, starts = _prepare(options, Path(scratch))
        arms = (*ARMS, *REFERENCES)
        jobs = [
            RunJob(draw, seed, arm, arm_run(arm, seed, starts[draw, seed]), cohorts[draw])
            for draw, seed in options.pairs()
            for arm in arms
        ]
        described = {job.arm: job.run.model_dump(mode="json", by_alias=True) for job in jobs[: len(arms)]}
        result = StudyResult("privacy", {"pairs": options.pairs(), "arms": described})
        done = run_jobs(measure, jobs, workers=options.workers, keep_for=options.json)
    for job, measured in zip(jobs, done, strict=True):
        result.add(job.arm, measured)
    result.ratios.update(answers(result))
    result.targets += targets(result)
    return result


def _prepare(options: StudyOptions, scratch: Path) -> tuple[dict[int, Path], dict[tuple[int, int], Path]]:
    """Draw -> its cohort, and (draw, seed) -> its public model."""
    draws = options.draw_numbers()
    cohorts = [CohortJob(draw, scratch / f"{draw}") for draw in draws]
    cohorts += [CohortJob(draw + _PUBLIC_DRAW, scratch / f"{draw + _PUBLIC_DRAW}", holdout=1) for draw in draws]
    folders = run_jobs(write_draw, cohorts, workers=options.workers)
    written = {job.draw: folder for job, folder in zip(cohorts, folders, strict=True)}
    public = [
        PublicJob(draw, seed, written[draw + _PUBLIC_DRAW], scratch / f"public-{draw}-{seed}")
        for draw, seed in options.pairs()
    ]
    starts = run_jobs(train_public, public, workers=options.workers)
    return written, dict(zip(options.pairs(), starts, strict=True))


def arm_run(arm: str, seed: int, public: Path) -> RunConfig:
    """The run of one arm; of `untrained` and `public`, the one that tells how they are measured.

    Args:
        public: Folder of the public model.
    """
    changes = [f"seed={seed}", f"train.rounds={_ROUNDS}", f"train.local-steps={_LOCAL_STEPS}"]
    changes += [f"train.batch-size={round(_RATE * _MEMBERS)}"]
    start, _, epsilon = arm.partition("-")
    if start == "warm" and epsilon in EPSILONS:
        changes.append("train.parts.kind=vectors")
    if start in ("warm", "public"):
        changes.append(f"start.model={str(public)!r}")
    run = load_simulation(_PRIVATE, [*changes, *_privacy(epsilon)])
    return run if epsilon in EPSILONS else run.model_copy(update={"patient_dp": None})


def _privacy(epsilon: str) -> list[str]:
    """Changes of an arm in the table `patient-dp`."""
    changes: dict[str, object] = {"public-subjects": _MEMBERS, "sample-rate": _RATE}
    if target := EPSILONS.get(epsilon):
        noise = noise_of(target, _ROUNDS, _LOCAL_STEPS)
        changes |= {"epsilon": target, "delta": _DELTA, "noise-multiplier": noise}
    else:  # a delta too large to claim anything, so that no ledger ends the run
        changes |= {"delta": 0.5, "noise-multiplier": 1e-12, "statistics-noise": 1e-12, "clip-norm": 1e3}
        changes["acknowledge-broken-guarantee"] = "true"
    return [f"patient-dp.{key}={value}" for key, value in changes.items()]


@cache
def noise_of(target: float, rounds: int, local_steps: int) -> float:
    """Noise multiplier with which so many rounds, their saliency included, spend an epsilon."""
    run = load_simulation(_PRIVATE, [f"train.local-steps={local_steps}"])
    gradients, *others = (replace(use, count=use.count * rounds) for use in planned(run))
    return noise_for(target, _DELTA, rate=_RATE, count=gradients.count, others=tuple(others))


def write_draw(job: CohortJob) -> Path:
    """Write one draw, half of each site's patients in the train split, and build its caches; returns its folder."""
    base = load_simulation(_PRIVATE)
    cohort = resized(cohort_of(base), job.draw, subjects=2 * _MEMBERS, holdout=job.holdout or _HOLDOUT)
    cohort.write(job.folder, base.streams)
    for folder in site_folders(job.folder / "sites"):
        halve(folder / "manifest.csv")
    OpenedCohort.open(job.folder, base)
    return job.folder


def halve(manifest: Path) -> None:
    """Put every other patient of a manifest into train and the rest into val: members, and others like them."""
    with manifest.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    number = {subject: index for index, subject in enumerate(dict.fromkeys(row["subject"] for row in rows))}
    split = ("train", "val")
    halved = [list({**row, "split": split[number[row["subject"]] % 2]}.values()) for row in rows]
    write_table(manifest, list(rows[0]), halved)


def train_public(job: PublicJob) -> Path:
    """Train the model of `transient` in one place; returns its folder, as `start.model` reads it."""
    changes = [f"train.rounds={_PUBLIC_ROUNDS}", f"train.local-steps={_PUBLIC_STEPS}"]
    run = load_simulation(TRANSIENT, [f"seed={job.seed}", f"train.batch-size={_PUBLIC_BATCH}", *changes])
    stores = [open_store(folder, run.streams) for folder in site_folders(job.cohort / "sites")]
    shared, _ = train_alone(run, join_stores(stores), "public").split_state(run.sharing)
    job.folder.mkdir()
    safetensors.torch.save_file(dict(shared), job.folder / "model.safetensors")
    (job.folder / "run.toml").write_text(dump_toml(run), encoding="utf-8")
    return job.folder


def measure(job: RunJob) -> dict[str, float]:
    """Train one arm, probe and attack its model."""
    run, cohort = job.run, OpenedCohort.open(job.cohort, job.run)
    before = start_model(run)
    after = before if job.arm in ("untrained", "public") else federate_on_copies(run, job.cohort).model
    members = [Place.of(store) for store in cohort.stores.values()]
    origin = build_model(run) if job.arm == "public" else before
    attack = audit_membership(run, origin.state_dict(), after.state_dict(), members, masks=_MASKS)
    inverted = _inverted(run, after, list(cohort.stores.values()))
    return {"auc": cohort.auc(run, after), "mia_auc": attack.auc.value, **inverted}


def _inverted(run: RunConfig, model: PanModel, stores: list[ImageStore]) -> dict[str, float]:
    attacked = Attacked(model, run, stores)
    noise = run.patient_dp.noise_multiplier if run.patient_dp else 0.0
    alone = [[patient] for patient in attacked.patients(_ATTACKED)]
    scenario = attacked.scenario("one patient", alone, partial(attacked.gradient, noise=noise))
    return {"psnr": float(np.mean(scenario.psnr)), "psnr_grey": float(np.mean(scenario.grey))}


def answers(result: StudyResult) -> dict[str, float]:
    """Costs and gains of every epsilon, as paired means, and the success of attacks at epsilon 8."""
    pairs = [(f"{start}-{epsilon}", f"{start}-inf") for start in ("cold", "warm") for epsilon in ("8", "2")]
    pairs += [(arm, "untrained") for arm in ("cold-inf", "cold-8", "cold-2", "public")]
    pairs += [(arm, "public") for arm in ("warm-inf", "warm-8", "warm-2", "warm-ordinary")]
    pairs += [("warm-8", "warm-ordinary"), ("warm-8", "cold-inf")]
    ratios = {f"auc/{arm}-minus-{other}": float(np.mean(result.gain("auc", arm, other))) for arm, other in pairs}
    ratios |= {f"mia_auc/{start}-8": result.mean("mia_auc", f"{start}-8") for start in ("cold", "warm")}
    return ratios | {f"psnr/{arm}-minus-grey": _above_grey(result, arm) for arm in ("cold-inf", "cold-8", "warm-8")}


def _above_grey(result: StudyResult, arm: str) -> float:
    return result.mean("psnr", arm) - result.mean("psnr_grey", arm)


def targets(result: StudyResult) -> list[Target]:
    """Targets of the private arms."""
    ratios = result.ratios
    return [
        Target("0.56 minus membership AUC at epsilon 8, cold", 0.56 - ratios["mia_auc/cold-8"], 0.0),
        Target("0.56 minus membership AUC at epsilon 8, warm", 0.56 - ratios["mia_auc/warm-8"], 0.0),
        Target("AUC at epsilon 8 minus non-private, warm", ratios["auc/warm-8-minus-warm-inf"], -0.02),
        Target("the same against all parameters, ordinary loop", ratios["auc/warm-8-minus-warm-ordinary"], -0.02),
    ]


def show(result: StudyResult, console: Console | None = None) -> None:
    """Mean and sd per arm, the differences, and the targets."""
    table = Table("arm", "AUC", "membership AUC", "PSNR", "of a grey", title="privacy: mean and sd over pairs")
    for arm in (*ARMS, *REFERENCES):
        decibels = (f"{result.mean(metric, arm):.1f}" for metric in ("psnr", "psnr_grey"))
        table.add_row(arm, *(mean_sd(result.values[metric, arm]) for metric in ("auc", "mia_auc")), *decibels)
    print_study(result, table, console=console)
