"""Private, pooled and naively averaged experts, where every hospital has modalities of its own.

Five hospitals without a modality in common, the same pictures and the same total of steps in every arm:

    dense        a federation of dense models
    private      experts and routers stay at their site (the default); directors and the rest are averaged
    pooled       experts are averaged one by one, by their gate mass
    naive        experts are averaged by subjects
    local        every site trains Director-Experts by itself
    centralised  all pictures in one place; as many steps as all sites together take

`probe_own` reads a site's own modalities with the model that the site ends up with (`private`: its own experts),
`probe_own_director` the same through the directors, `probe_heldout` a modality that nobody has, through them too.
`probe_newsite` is a hospital with that modality that joins at the end and trains 50 steps from the shared model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from panfm.config import RunConfig
from panfm.models import PanModel
from panfm.models.backbone import Route
from panfm.models.transfer import director_run, director_state
from simulations.alone import train_alone, train_together
from simulations.expert_map import model_at_site
from simulations.harness import ArmJob, StudyOptions, run_arms, study
from simulations.studies._federations import federated, outcome
from simulations.studies._modalities import (
    Pictures,
    print_result,
    probe_joined,
    probe_own,
    study_run,
    with_backbone,
    write_draw,
)
from simulations.study_result import StudyResult, Target

ARMS = ("dense", "private", "pooled", "naive", "local", "centralised")
DEFAULT = "private"
ROUNDS = {"short": 15, "medium": 75, "long": 200}
METRICS = ("probe_own", "probe_own_director", "probe_heldout", "probe_newsite", "bytes_round")
_LOCAL_STEPS = 20


@dataclass(frozen=True)
class Trained:
    """The models of a trained arm."""

    sites: Mapping[str, PanModel]
    """Site -> the model it uses."""
    shared: Sequence[PanModel]
    """Models that a new site may start from: the federation's, or every lone site's own."""
    bytes_round: float = float("nan")
    """Bytes of parameters that a round sends, both ways and over all sites; NaN where nothing is sent."""


@study(seeds=5, budgets=ROUNDS, unit=f"rounds of {_LOCAL_STEPS} steps")
def main(options: StudyOptions, budget: str) -> StudyResult:
    """Federated Director-Experts with private, pooled and naively averaged experts."""
    result = run(options, ROUNDS[budget])
    print_result(result, ARMS, METRICS, None)
    return result


def run(options: StudyOptions, rounds: int) -> StudyResult:
    """Run the study."""
    described = {arm: arm_run(0, arm, rounds).model_dump(mode="json", by_alias=True) for arm in ARMS}
    result = StudyResult("dex-federated", {"pairs": options.pairs(), "rounds": rounds, "arms": described})
    for job, measured in run_arms(options, ARMS, rounds, write_draw, measure):
        result.add(job.arm, measured)
    _add_answers(result)
    result.targets += targets(result)
    return result


def arm_run(seed: int, arm: str, rounds: int) -> RunConfig:
    """The run of one arm."""
    base = study_run(seed, steps=rounds * _LOCAL_STEPS, rounds=rounds)
    run = with_backbone(base, "dense" if arm == "dense" else "director-experts")
    experts = arm if arm in ("private", "naive") else "pooled"
    return run.model_copy(update={"sharing": run.sharing.model_copy(update={"experts": experts})})


def measure(job: ArmJob) -> dict[str, float]:
    """Train one arm, and probe what every site, and one that joins, gets from it."""
    run = arm_run(job.seed, job.arm, job.length)
    pictures = Pictures.open(job.cohort, run)
    trained = train_arm(job, run, pictures)
    measured = {"probe_own": _own(pictures, trained), "bytes_round": trained.bytes_round}
    if run.model.backbone == "director-experts":
        measured["probe_own_director"] = _own(pictures, trained, "director")
    dense = [(director_run(run), director_state(model)) for model in trained.shared]
    measured["probe_heldout"] = float(np.mean([probe_joined(pictures, *start, frozen=True) for start in dense]))
    start = {} if job.arm == "local" else trained.shared[0].state_dict()
    return measured | {"probe_newsite": probe_joined(pictures, run, start, frozen=False)}


def _own(pictures: Pictures, trained: Trained, route: Route = "experts") -> float:
    aucs = [
        probe_own(pictures, trained.sites[name], site, tuple(site.store.images), route)
        for name, site in pictures.sites.items()
    ]
    return float(np.mean(np.concatenate(aucs)))


def train_arm(job: ArmJob, run: RunConfig, pictures: Pictures) -> Trained:
    """Train an arm to its end."""
    stores = pictures.stores
    if job.arm == "local":
        models = {name: train_alone(run, store, name) for name, store in stores.items()}
        return Trained(models, list(models.values()))
    if job.arm == "centralised":
        model = train_together(run, list(stores.values()))
        return Trained(dict.fromkeys(stores, model), [model])
    return train_federation(run, job.cohort, list(stores))


def train_federation(run: RunConfig, cohort: Path, sites: Sequence[str]) -> Trained:
    """Run a federation over the sites of a cohort's folder, and read the model of each."""
    with federated(run, cohort) as folder:
        shared, rounds = outcome(folder).model, folder.rounds()
        models = {site: model_at_site(folder, shared, site) for site in sites}
    sent = [sum(line["bytes_up"].values()) + sum(line["bytes_down"].values()) for line in rounds]
    return Trained(models, [shared], float(np.mean(sent)))


def _add_answers(result: StudyResult) -> None:
    """Add the questions of the study, as paired means and as shares of pairs."""
    private, pooled = (result.mean("bytes_round", arm) for arm in ("private", "pooled"))
    result.ratios["bytes_private_over_all"] = private / pooled
    for metric in ("probe_own", "probe_heldout", "probe_newsite"):
        for baseline in ARMS:
            if baseline != DEFAULT:
                result.add_gain(metric, DEFAULT, baseline, with_interval=True)


def targets(result: StudyResult) -> list[Target]:
    """Targets of the default arm."""
    gains = [
        Target(f"{metric}, {DEFAULT} minus {baseline}", result.ratios[f"{metric}/{DEFAULT}-minus-{baseline}"], 0.0)
        for metric in ("probe_own", "probe_newsite")
        for baseline in ("naive", "dense")
    ]
    bytes_saved = 1.0 - result.ratios["bytes_private_over_all"]
    return [*gains, Target(f"share of the bytes that {DEFAULT} saves", bytes_saved, 0.55)]
