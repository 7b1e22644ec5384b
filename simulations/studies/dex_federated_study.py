"""Private, pooled and naively averaged experts, where every hospital has modalities of its own.

Five hospitals without a modality in common, the same pictures and the same total of steps in every arm:

    dense        a federation of dense models
    private      experts and routers stay at their site (the default); directors and the rest are averaged
    pooled       experts are averaged one by one, by their gate mass
    naive        experts are averaged by subjects
    local        every site trains Director-Experts by itself
    centralised  all pictures in one place; as many steps as all sites together take

`probe_own` reads a site's own modalities with the model that the site ends up with (`private`: its own experts),
`probe_own_director` the same route the directors, `probe_heldout` a modality that nobody has, route the directors.
`probe_newsite` is a hospital with that modality that joins at the end and trains 50 steps from the shared model.
"""

import contextlib
import io
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from panfm.config import RunConfig
from panfm.data.store import join_stores
from panfm.evaluate.embed import load_model
from panfm.models import PanModel
from panfm.models.backbone import Route
from panfm.models.transfer import director_run, director_state
from panfm.site.state import StateStore
from server.run_folder import RunFolder
from simulations.alone import train_alone
from simulations.engines import Job as EngineJob
from simulations.engines import run_job
from simulations.harness import (
    Draws,
    FirstSeed,
    JsonFile,
    Seeds,
    StudyOptions,
    StudyResult,
    Target,
    check_writable,
    run_jobs,
    steps_of,
)
from simulations.studies._modalities import (
    CohortJob,
    Pictures,
    half_interval,
    print_result,
    probe_joined,
    probe_own,
    study_run,
    with_backbone,
    write_draw,
)

ARMS = ("dense", "private", "pooled", "naive", "local", "centralised")
DEFAULT = "private"
ROUNDS = {"short": 15, "medium": 75, "long": 200}
METRICS = ("probe_own", "probe_own_director", "probe_heldout", "probe_newsite", "bytes_round")
_LOCAL_STEPS = 20


@dataclass(frozen=True)
class ArmJob:
    """One arm, trained once and measured."""

    draw: int
    seed: int
    arm: str
    rounds: int
    cohort: Path

    def __str__(self) -> str:
        return f"pictures {self.draw}, seed {self.seed}, {self.arm}, {self.rounds} rounds"


@dataclass(frozen=True)
class Trained:
    """Models of an arm at the end of its training."""

    sites: Mapping[str, PanModel]
    """Site -> the model it uses."""
    shared: Sequence[PanModel]
    """What somebody else may start from: the federation's model, or every lone site's own."""
    bytes_round: float = float("nan")
    """Bytes of parameters that a round sends, both ways and over all sites; NaN where nothing is sent."""


def main(
    seeds: Seeds = 5,
    draws: Draws = 1,
    first_seed: FirstSeed = 0,
    budget: Annotated[str, typer.Option(help="short, medium or long: 15, 75 or 200 rounds of 20 steps.")] = "short",
    json: JsonFile = None,
) -> None:
    """Federated Director-Experts with private, pooled and naively averaged experts."""
    size = steps_of(budget, ROUNDS)
    check_writable(json)
    result = run(StudyOptions(seeds, draws, first_seed, json=json), size)
    print_result(result, ARMS, METRICS, None)
    if json:
        result.write(json)


def run(options: StudyOptions, rounds: int) -> StudyResult:
    """Run the study."""
    described = {arm: arm_run(0, arm, rounds).model_dump(mode="json", by_alias=True) for arm in ARMS}
    result = StudyResult("dex-federated", {"pairs": options.pairs(), "rounds": rounds, "arms": described})
    with tempfile.TemporaryDirectory() as scratch:
        draws = options.draw_numbers()
        cohorts = [CohortJob(draw, Path(scratch) / str(draw)) for draw in draws]
        folders = dict(zip(draws, run_jobs(write_draw, cohorts, workers=options.workers), strict=True))
        jobs = [ArmJob(draw, seed, arm, rounds, folders[draw]) for draw, seed in options.pairs() for arm in ARMS]
        done = run_jobs(measure, jobs, workers=options.workers, keep_for=options.json)
    for job, measured in zip(jobs, done, strict=True):
        result.add(job.arm, measured)
    result.ratios.update(_answers(result))
    result.targets += targets(result)
    return result


def arm_run(seed: int, arm: str, rounds: int) -> RunConfig:
    """The run of one arm."""
    run = with_backbone(
        study_run(seed, steps=rounds * _LOCAL_STEPS, rounds=rounds),
        "dense" if arm == "dense" else "director-experts",
    )
    experts = arm if arm in ("private", "naive") else "pooled"
    return run.model_copy(update={"sharing": run.sharing.model_copy(update={"experts": experts})})


def measure(job: ArmJob) -> dict[str, float]:
    """Train one arm, and probe what every site, and one that joins, gets from it."""
    run = arm_run(job.seed, job.arm, job.rounds)
    pictures = Pictures.open(job.cohort, run)
    trained = train_arm(job, run, pictures)
    measured = {"probe_own": _own(pictures, trained), "bytes_round": trained.bytes_round}
    if run.model.backbone == "director-experts":
        measured["probe_own_director"] = _own(pictures, trained, "director")
    dense = [(director_run(run), director_state(model)) for model in trained.shared]
    measured["probe_heldout"] = float(np.mean([probe_joined(pictures, *each, frozen=True) for each in dense]))
    start = {} if job.arm == "local" else trained.shared[0].state_dict()
    return measured | {"probe_newsite": probe_joined(pictures, run, start, frozen=False)}


def _own(pictures: Pictures, trained: Trained, route: Route = "experts") -> float:
    places = pictures.sites.items()
    each = [probe_own(pictures, trained.sites[name], place, tuple(place.store.images), route) for name, place in places]
    return float(np.mean(np.concatenate(each)))


def train_arm(job: ArmJob, run: RunConfig, pictures: Pictures) -> Trained:
    """Train an arm to its end."""
    stores = {name: place.store for name, place in pictures.sites.items()}
    if job.arm == "local":
        models = {name: train_alone(run, store, name) for name, store in stores.items()}
        return Trained(models, list(models.values()))
    if job.arm == "centralised":
        train = run.train.model_copy(update={"local_steps": run.train.local_steps * len(stores)})
        model = train_alone(run.model_copy(update={"train": train}), join_stores(list(stores.values())), "everyone")
        return Trained(dict.fromkeys(stores, model), [model])
    return _federate(run, job.cohort, list(stores))


def _federate(run: RunConfig, cohort: Path, sites: Sequence[str]) -> Trained:
    """A federation over the in-process engine; its progress is not shown."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        folder = RunFolder.create(Path(scratch) / "run", run)
        run_job(EngineJob(cohort / "sites", folder.path), "local")
        shared, _ = load_model(folder.path / "model")
        models = {site: _at_site(folder, shared, site) for site in sites}
        lines = folder.rounds()
    sent = [sum(line["bytes_up"].values()) + sum(line["bytes_down"].values()) for line in lines]
    return Trained(models, [shared], float(np.mean(sent)))


def _at_site(folder: RunFolder, shared: PanModel, site: str) -> PanModel:
    """The shared model with what the site keeps to itself."""
    state = folder.latest_state()
    assert state is not None
    kept = StateStore(folder.path / "sites" / site, state.run_id).load(state.round_number)
    private = {name.removeprefix("student."): value for name, value in kept.items() if name.startswith("student.")}
    model = deepcopy(shared)
    model.load_state_dict(shared.state_dict() | private)
    return model


def _answers(result: StudyResult) -> dict[str, float]:
    """The questions of the study, as paired means and as shares of pairs."""
    answers = {"bytes_private_over_all": result.mean("bytes_round", "private") / result.mean("bytes_round", "pooled")}
    for metric in ("probe_own", "probe_heldout", "probe_newsite"):
        for baseline in ARMS:
            if baseline != DEFAULT:
                gain = np.array(result.gain(metric, DEFAULT, baseline))
                answers[f"{metric}/{DEFAULT}-minus-{baseline}"] = float(gain.mean())
                answers[f"{metric}/{DEFAULT}-minus-{baseline}/half-interval"] = half_interval(gain)
                answers[f"{metric}/{DEFAULT}-at-least-{baseline}"] = float((gain >= 0).mean())
    return answers


def targets(result: StudyResult) -> list[Target]:
    """Targets of the study, for the arm that is the default."""
    gains = [
        Target(f"{metric}, {DEFAULT} minus {baseline}", result.ratios[f"{metric}/{DEFAULT}-minus-{baseline}"], 0.0)
        for metric in ("probe_own", "probe_newsite")
        for baseline in ("naive", "dense")
    ]
    bytes_saved = 1.0 - result.ratios["bytes_private_over_all"]
    return [*gains, Target(f"share of the bytes that {DEFAULT} saves", bytes_saved, 0.55)]
