"""Worth of pre-training where few images are labelled: segmentation and classification of real images.

    busi          breast ultrasound: benign, malignant or normal; AUC, mean over the classes
    hippocampus   anterior and posterior hippocampus in MR volumes; Dice
    slices        the same in one sagittal slice of each volume, a picture; Dice

Every seed holds out another quarter of the people; the others are shared out over two sites (`_downstream_data.py`).

    scratch           an untrained model
    pretrained        the same model, pre-trained by the two sites together on their images, without a label
    scratch-vit-s     an untrained ViT-S/14; pictures only
    public            the same, with the public weights that $PANFM_WEIGHTS names

All are fine-tuned by `panfm finetune`'s code, on the same images, with the same head, steps and rates, and tested on
the held-out people. `scratch` and `pretrained` are trained whole, of the two large models the last two blocks.

    dice_<task>_<n>, auc_<task>_<n>     fine-tuned on n labelled images (`busi`: n of each class): 5, 20 or all; a fifth
                                        of these validates
    <arm>-probe                         a linear probe on the frozen model, fitted on the same images; `busi` only
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from panfm.config import RunConfig
from panfm.config.run_file import run_of_table
from panfm.data.cache import open_store
from panfm.finetune.fine_tuning import FineTuning
from panfm.finetune.finetune_settings import FinetuneSettings
from panfm.finetune.finetuned_model import TaskModel
from panfm.finetune.task_data import TaskData, divided, read_examples
from panfm.finetune.task_result import LINEAR, TUNED, FrozenFeatures, TaskResult, score_labels, score_segmentation
from panfm.models import PanModel, build_model
from panfm.models.warm_start import start_model
from panfm.texts import parse_toml
from simulations.cohorts.prepare import public_weights
from simulations.cohorts.real_images import HIPPOCAMPUS
from simulations.harness import ArmJob, CohortJob, StudyOptions, chosen_arms, run_arms, study
from simulations.studies._downstream_data import FINDING, ULTRASOUND, WRITERS, site_folders
from simulations.studies._federations import federate
from simulations.studies._start_arms import possible_arms
from simulations.studies._tables import print_arms
from simulations.study_result import StudyResult, Target

SCRATCH, PRETRAINED, SCRATCH_VIT, PUBLIC = ARMS = ("scratch", "pretrained", "scratch-vit-s", "public")
PAIRS = ((PRETRAINED, SCRATCH), (PUBLIC, SCRATCH_VIT))
"""Arm, and the untrained model of its size."""
LABELS: Mapping[str, int | None] = {"5": 5, "20": 20, "all": None}
FEW = "5"
_CLASSES = 3
"""Classes of `busi`, of each of which as many images are labelled."""


@dataclass(frozen=True)
class DownstreamTask:
    """Descriptions of a task's run and of its fine-tuning."""

    metric: str
    pretraining: str
    """Description of the run that pre-trains (TOML)."""
    tuning: Mapping[str, Any]
    """Settings of the fine-tuning of the small models."""
    large_tuning: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the fine-tuning that differ for the large models; empty where no large model is measured."""
    large_size: int = 84
    """Pixels along the edges of the pictures of large models."""
    stream: str = HIPPOCAMPUS
    task: str = "segmentation"
    labels_factor: int = 1
    """Labelled images for each one that `LABELS` counts."""


TASKS = {
    "busi": DownstreamTask(
        "auc",
        """
        name = "downstream-busi"
        [streams]
        breast-ultrasound = { shape = [32, 32], patch = [4, 4] }
        [objective]
        name = "views"
        [augment]
        [features]
        pooling = "layers"
        [masking]
        policy = "random"
        ratio = 0.5
        [train]
        rounds = 10
        local-steps = 20
        batch-size = 48
        learning-rate = 5e-3
        """,
        {"steps": 100, "batch_size": 16, "learning_rate": 5e-4, "validate_every": 20},
        {"steps": 40, "parts": "last-blocks:2", "batch_size": 8, "learning_rate": 2e-4, "validate_every": 10},
        stream=ULTRASOUND,
        task=f"labels.csv:{FINDING}",
        labels_factor=_CLASSES,
    ),
    "hippocampus": DownstreamTask(
        "dice",
        """
        name = "downstream-hippocampus"
        [streams]
        hippocampus-mr = { spacing-mm = [2.0, 2.0, 2.0], shape = [20, 28, 20], patch = [4, 4, 4] }
        [objective]
        name = "mae"
        [masking]
        policy = "random"
        ratio = 0.6
        [train]
        rounds = 10
        local-steps = 20
        batch-size = 16
        """,
        {"steps": 120, "batch_size": 4, "augment": False},
    ),
    "slices": DownstreamTask(
        "dice",
        """
        name = "downstream-slices"
        [streams]
        hippocampus-mr = { shape = [60, 60], patch = [6, 6] }
        [objective]
        name = "mae"
        [masking]
        policy = "random"
        ratio = 0.6
        [train]
        rounds = 5
        local-steps = 30
        batch-size = 32
        """,
        {"steps": 160, "batch_size": 8},
        {"steps": 100, "batch_size": 4, "parts": "last-blocks:2"},
        large_size=56,
    ),
}
LARGE = {
    "model": {"size": "small", "tokenizer": "patch", "positions": "learned", "layer-scale": True},
    "features": {"pooling": "layers", "layers": [8, 10, 12]},
    "train": {"parts": {"kind": "last-blocks", "blocks": 2}},
}
"""Changes of a run for a ViT-S/14 in DINOv2's layout."""

Arms = Annotated[str, typer.Option(help="Only these arms, with commas between.")]
Tasks = Annotated[str, typer.Option(help="Only these tasks, with commas between.")]

_ALL_ARMS, _ALL_TASKS = ",".join(ARMS), ",".join(TASKS)


@study(seeds=3, draws=None)
def main(options: StudyOptions, arms: Arms = _ALL_ARMS, tasks: Tasks = _ALL_TASKS) -> StudyResult:
    """Fine-tuning of pre-trained, public and untrained models on 5, 20 and all labelled images."""
    chosen = possible_arms(chosen_arms(arms, ARMS), without_weights=(SCRATCH, PRETRAINED))
    result = run(options, chosen, chosen_arms(tasks, tuple(TASKS), "--tasks"))
    print_arms(result, "downstream")
    return result


def run(options: StudyOptions, arms: Sequence[str], tasks: Sequence[str]) -> StudyResult:
    """Run the study with some of the arms and tasks."""
    runs = {name: task_run(name, SCRATCH, 0) for name in tasks}
    described = {name: run.model_dump(mode="json", by_alias=True, exclude_none=True) for name, run in runs.items()}
    tuned = {name: {"small": dict(TASKS[name].tuning), "large": dict(TASKS[name].large_tuning)} for name in tasks}
    result = StudyResult("downstream", {"pairs": options.pairs(), "runs": described, "fine-tuning": tuned})
    jobs = [f"{name}/{arm}" for name in tasks for arm in arms if is_possible(name, arm)]
    for job, measured in run_arms(options, jobs, 0, write_draw, measure):
        _, _, arm = job.arm.partition("/")
        for metric, value in measured.items():
            suffix, _, own = metric.rpartition(":")
            result.add(arm + suffix, {own: value})
    add_answers(result)
    return result


def is_possible(name: str, arm: str) -> bool:
    """Whether a task is measured with an arm: large models read pictures alone."""
    return arm in (SCRATCH, PRETRAINED) or bool(TASKS[name].large_tuning)


def task_run(name: str, arm: str, seed: int) -> RunConfig:
    """The run of an arm; of arms that are not pre-trained only its model is used."""
    table = parse_toml(TASKS[name].pretraining, f"downstream, {name}") | {"seed": seed}
    if arm in (SCRATCH_VIT, PUBLIC):
        size = TASKS[name].large_size
        table |= LARGE | {"streams": {TASKS[name].stream: {"shape": [size, size], "patch": [14, 14]}}}
    if arm == PUBLIC:
        table |= {"start": {"model": public_weights()}}
    return run_of_table(table, f"downstream, {name}, {arm}")


def write_draw(job: CohortJob) -> Path:
    """Write the folders of all tasks, and build the caches of their images."""
    for name, write in WRITERS.items():
        write(job.folder / name, job.draw)
        for arm in (arm for arm in (SCRATCH, SCRATCH_VIT) if is_possible(name, arm)):
            for folder in site_folders(job.folder / name):
                open_store(folder, task_run(name, arm, job.draw).streams)
    return job.folder


def measure(job: ArmJob) -> dict[str, float]:
    """Make the model of an arm, and fine-tune it on each number of labels."""
    name, _, arm = job.arm.partition("/")
    task, folder = TASKS[name], job.cohort / name
    run, start = task_run(name, arm, job.seed), arm_state(name, arm, job.seed, folder)
    own = {**task.tuning, **(task.large_tuning if arm in (SCRATCH_VIT, PUBLIC) else {})}
    sites = tuple(map(str, site_folders(folder)))
    given = {"model": "", "data": sites, "task": task.task, "validate_every": 40, "seed": job.seed}
    settings = FinetuneSettings.of_options(given | own)
    examples = read_examples(settings, run)
    measured = {}
    for labels, number in LABELS.items():
        patients = None if number is None else number * task.labels_factor
        model = build_model(run)
        model.load_state_dict(start)
        result = tune(model, examples, settings.model_copy(update={"patients": patients}))
        metric = f"{task.metric}_{name}_{labels}"
        measured[metric] = result.find(TUNED, task.metric).value
        if task.metric == "auc":
            measured[f"-probe:{metric}"] = result.find(LINEAR, task.metric).value
    return measured


def arm_state(name: str, arm: str, seed: int, folder: Path) -> Mapping[str, Any]:
    """Parameters of an arm's model before the fine-tuning."""
    run = task_run(name, arm, seed)
    if arm == PRETRAINED:
        return federate(run, folder).model.state_dict()
    return (start_model(run) if arm == PUBLIC else build_model(run)).state_dict()


def tune(model: PanModel, examples: TaskData, settings: FinetuneSettings) -> TaskResult:
    """Fine-tune a model on some of the examples, and score it on the held-out people."""
    data = divided(examples, settings)
    frozen = None if data.masked else FrozenFeatures.of(model, data)
    tuning = FineTuning(model, data, settings)
    tuning.run()
    task_model = TaskModel(data.task, tuning.head)
    if frozen is None:
        return score_segmentation(task_model, model, data)
    return score_labels(task_model, model, data, frozen)


def add_answers(result: StudyResult) -> None:
    """Add the gains of both pre-trained arms, and the target: a task in which pre-training wins in all seeds."""
    measured = {*result.values}
    shares = []
    for metric in dict.fromkeys(metric for metric, _ in result.values):
        for arm, baseline in PAIRS:
            if {(metric, arm), (metric, baseline)} <= measured:
                result.add_gain(metric, arm, baseline)
                if metric.endswith(f"_{FEW}"):
                    shares.append(result.share_won(metric, arm, baseline))
    if shares:
        told = f"largest share of seeds that pre-training wins at {FEW} labels, over tasks and models"
        result.targets.append(Target(told, max(shares), 1.0))
