"""Director-Experts from a public start, on real pictures: do experts pay at their site, and does the director transfer?

The sites of `real-pictures` without breast ultrasound, which no site has. $PANFM_WEIGHTS names a public ViT-S/14, whose
last two blocks are trained by `views` (`_start_arms.py`):

    start    the frozen public model
    dense    a federation of dense models
    private  in place of the MLPs of both blocks four experts, of which a picture uses two; experts and routers stay at
             their site, directors and the rest are averaged
    pooled   experts are averaged one by one, by their gate mass
    local    every site trains Director-Experts by itself; transfer is the mean over its models

Experts and directors begin as the public model's MLPs, so that every arm begins as `start`. Blocks that are not trained
have one expert, which is their MLP. Directors follow their experts with a momentum that is tied to the length of the
run, as `train.teacher-momentum = "auto"` is. Models are read by the last block, CLS and the mean of the tokens.

    own_<percent>           AUC of the classes of a site's own modality (CT, X-ray), by the model that the site ends up
                            with, at so many per cent of the labels (`_class_probe.py`)
    own_director_<percent>  the same through the directors
    heldout_<percent>       AUC on ultrasound, through the directors
    bytes_round             bytes of parameters that a round sends, both ways and over all sites
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from panfm.config import RunConfig
from panfm.config.features import FeaturesConfig
from panfm.data.store import ImageStore
from panfm.models import PanModel
from panfm.models.transfer import director_run, director_state
from panfm.models.warm_start import read_start, start_model, start_state
from simulations.alone import train_alone
from simulations.cohorts.opened import OpenedCohort
from simulations.cohorts.prepare import cohort_of
from simulations.harness import ArmJob, CohortJob, StudyOptions, chosen_arms, run_arms, study
from simulations.studies import _start_arms as public
from simulations.studies._class_probe import LABEL_DRAWS, Indices, Read, probe_streams, probed_streams
from simulations.studies._cohorts import write_files
from simulations.studies._modalities import print_result
from simulations.studies.dex_federated_study import Trained, train_federation
from simulations.study_result import StudyResult, Target

ARMS = ("start", "dense", "private", "pooled", "local")
METRICS = (
    *(f"{family}_{percent}" for family in ("own", "own_director", "heldout") for percent in LABEL_DRAWS),
    "bytes_round",
)
ROUNDS = {"short": 3, "medium": 10}
EXPERTS = (
    'model.backbone="director-experts"',
    "model.experts.count=[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4, 4]",
    "model.experts.active=[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2]",
)
"""What the arms with experts change in the run of `adapted`, as `--set` would."""
FEATURES = FeaturesConfig(pooling="cls+mean")
_LOCAL_STEPS = 10

Arms = Annotated[str, typer.Option(help="Only these arms, with commas between.")]
_ALL = ",".join(ARMS)


@study(seeds=3, budgets=ROUNDS, unit=f"rounds of {_LOCAL_STEPS} steps")
def main(options: StudyOptions, budget: str, arms: Arms = _ALL) -> StudyResult:
    """Director-Experts from a public start on real pictures: experts at their site, director on a new modality."""
    public.require_weights()
    result = run(options, ROUNDS[budget], chosen_arms(arms, ARMS))
    print_result(result, [arm for arm in ARMS if arm in chosen_arms(arms, ARMS)], METRICS, None)
    return result


def run(options: StudyOptions, rounds: int, arms: Sequence[str]) -> StudyResult:
    """Run the study with some of the arms."""
    described = {arm: arm_run(0, arm, rounds).model_dump(mode="json", by_alias=True, exclude_none=True) for arm in arms}
    result = StudyResult("dex-pictures", {"pairs": options.pairs(), "rounds": rounds, "runs": described})
    for job, measured in run_arms(options, arms, rounds, write_draw, measure):
        result.add(job.arm, measured)
    for arm in arms:
        for baseline in ("start", "dense", "local"):
            if baseline in arms and arm not in ("start", baseline):
                for family in ("own", "heldout"):
                    add_family_gain(result, family, arm, baseline)
    if {"private", "start"} <= {*arms}:
        gain = result.ratios["heldout/private-minus-start"]
        result.targets.append(Target("AUC on the held-out modality, director minus start", gain, 0.0))
    return result


def add_family_gain(result: StudyResult, family: str, arm: str, baseline: str) -> None:
    """Add a gain as the mean over the shares of labels."""
    gains = [result.gain(f"{family}_{percent}", arm, baseline) for percent in LABEL_DRAWS]
    result.ratios[f"{family}/{arm}-minus-{baseline}"] = float(np.mean(gains))


def arm_run(seed: int, arm: str, rounds: int) -> RunConfig:
    """The run of one arm."""
    changes = [f"train.rounds={rounds}", f"train.local-steps={_LOCAL_STEPS}"]
    if arm not in ("start", "dense"):
        steps = rounds * _LOCAL_STEPS
        momentum = [max(0.0, 1.0 - 10.0 / steps), 1.0 - 1.0 / steps]
        changes += [*EXPERTS, f"model.experts.director-momentum={momentum}"]
        changes.append(f'sharing.experts="{"pooled" if arm == "pooled" else "private"}"')
    return public.start_run(seed, "adapted", changes)


def write_draw(job: CohortJob) -> Path:
    """Write the pictures, and the sites as they train; returns the folder."""
    run = arm_run(0, "dense", 1)
    write_files(cohort_of(run), job.folder, run)
    public.write_without(job.folder, run, public.HELD_OUT)
    return job.folder


def measure(job: ArmJob) -> dict[str, float]:
    """Train one arm, and probe the sites' models and the directors."""
    run = arm_run(job.seed, job.arm, job.length)
    cohort = OpenedCohort.open(job.cohort, run)
    training = public.folder_without(job.cohort, public.HELD_OUT)
    trained = train_arm(job.arm, run, training)
    own = [stream for stream in probed_streams(cohort) if stream != public.HELD_OUT]
    measured = {"bytes_round": trained.bytes_round}
    measured |= probe_family("own", own_reader(trained.sites, run, cohort), cohort, job.seed, own)
    dense = director_run(run)
    transfers = [
        probe_family(
            "heldout", public.StreamReader(model, dense, FEATURES, cohort), cohort, job.seed, [public.HELD_OUT]
        )
        for model in (director_model(model, run) for model in trained.shared)
    ]
    measured |= {name: float(np.mean([values[name] for values in transfers])) for name in transfers[0]}
    if run.model.backbone == "director-experts":
        directors = {site: director_model(model, run) for site, model in trained.sites.items()}
        measured |= probe_family("own_director", own_reader(directors, dense, cohort), cohort, job.seed, own)
    return measured


def probe_family(family: str, read: Read, cohort: OpenedCohort, seed: int, streams: Sequence[str]) -> dict[str, float]:
    """Mean AUC over some streams at every share of the labels: `<family>_<percent>`."""
    measured = probe_streams(read, cohort, seed, streams)
    return {
        f"{family}_{percent}": float(np.mean([measured[f"auc_{stream}_{percent}"] for stream in streams]))
        for percent in LABEL_DRAWS
    }


def own_reader(models: Mapping[str, PanModel], run: RunConfig, cohort: OpenedCohort) -> Read:
    """Read every stream by the model of the site that has it."""
    readers = {site: public.StreamReader(model, run, FEATURES, cohort) for site, model in models.items()}

    def read(store: ImageStore, stream: str, indices: Indices) -> NDArray[np.floating]:
        [site] = [name for name, own in cohort.stores.items() if stream in own.images]
        return readers[site](store, stream, indices)

    return read


def director_model(model: PanModel, run: RunConfig) -> PanModel:
    """The dense model that goes through a model's directors, with tokenizers of all streams, which nobody trains."""
    dense = start_model(director_run(run))
    dense.load_state_dict(dense.state_dict() | director_state(model))
    return dense


def train_arm(arm: str, run: RunConfig, folder: Path) -> Trained:
    """Train an arm over the sites of a cohort's folder."""
    stores = OpenedCohort.open(folder, run).stores
    if arm == "start":
        model = start_model(run)
        return Trained(dict.fromkeys(stores, model), [model])
    if arm == "local":
        start = start_state(run, read_start(run))
        models = {name: train_alone(run, store, name, start=start) for name, store in stores.items()}
        return Trained(models, list(models.values()))
    return train_federation(run, folder, list(stores))
