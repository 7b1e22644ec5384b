"""Few labels at each of three sites: does a classifier that they fine-tune together beat each site's own?

Tasks are the classes of the real pictures of a modality ($PANFM_REAL_DATA): ultrasound (benign, malignant, normal) and
xray (chest, hand, child healthy or with pneumonia). In every draw each site has 20 labelled training pictures, the
classes in shares of its own (drawn from a flat Dirichlet distribution). The pictures of the patients that no site has
are the test set.

    federated    encoder and head are trained by a run with `[task]` over the three sites
    site:<name>  the same training at one site alone, with as many steps as the site takes in the federation
    best-site    in each draw the site's own model with the best score, chosen on the test pictures
    pooled       the same training on all pictures in one place, with as many steps as all sites together

Where $PANFM_WEIGHTS names a public ViT-S/14 in DINOv2's layout, all start from it, read pictures of 84 x 84 pixels, and
train the head alone; else all start from the same untrained small model, and train all of it.

    auc_<task>, accuracy_<task>    on the test pictures; AUC is the mean over the classes, each against the others
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from panfm.config import RunConfig, site_folders
from panfm.config.run_file import run_of_table
from panfm.data.task_labels import open_training_store
from panfm.evaluate.result import HOLDOUT
from panfm.models import PanModel
from panfm.models.warm_start import start_model
from panfm.seeds import numpy_generator
from panfm.texts import parse_toml
from simulations.alone import train_alone, train_together
from simulations.cohorts.prepare import public_weights
from simulations.cohorts.real_images import real_data
from simulations.cohorts.real_modalities import FOLDER, Picture, read_pictures
from simulations.cohorts.site_folder import write_site_folder
from simulations.harness import ArmJob, CohortJob, StudyOptions, run_arms, study
from simulations.studies._federations import federate
from simulations.studies._tables import print_arms
from simulations.study_result import StudyResult, Target
from simulations.task_scores import TaskPlace

TASKS = {"ultrasound": "breast-ultrasound", "xray": "chest-xray"}
"""Task, which is a modality, -> the stream that it is read as."""
SITES = ("site-1", "site-2", "site-3")
LABELS = 20
"""Training pictures of a site."""
ARMS = ("federated", *(f"site:{name}" for name in SITES), "pooled")
BEST = "best-site"
_CONCENTRATION = 1.0
"""Concentration of the Dirichlet distribution of a site's classes; the larger, the more alike sites are."""
_SCRATCH = """
[streams.{stream}]
shape = [32, 32]
patch = [4, 4]

[augment]

[train]
rounds = 20
local-steps = 10
batch-size = 10
learning-rate = 3e-3
"""
_PUBLIC = """
[streams.{stream}]
shape = [84, 84]
patch = [14, 14]

[start]
model = "{weights}"

[model]
size = "small"
tokenizer = "patch"
positions = "learned"
layer-scale = true

[features]
pooling = "cls+mean"

[train]
parts = "head"
rounds = 20
local-steps = 5
batch-size = 10
learning-rate = 1e-2
"""


@study(seeds=3, draws=None)
def main(options: StudyOptions) -> StudyResult:
    """Classifiers of real pictures, fine-tuned by three sites together, by each alone, and in one place."""
    result = run(options)
    print_arms(result, "federated fine-tuning")
    return result


def run(options: StudyOptions) -> StudyResult:
    """Run the study."""
    described = {
        task: task_run(task, 0).model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"start"})
        for task in TASKS
    }
    start = "public" if public_weights() else "untrained"
    config = {"pairs": options.pairs(), "start": start, "labels": LABELS, "runs": described}
    result = StudyResult("federated-fine-tuning", config)
    for job, measured in run_arms(options, [f"{start}/{arm}" for arm in ARMS], 0, write_draw, measure):
        result.add(job.arm.rpartition("/")[2], measured)
    add_best_site(result)
    for metric in metrics(result):
        for baseline in (BEST, "pooled"):
            result.add_gain(metric, "federated", baseline, with_interval=True)
    result.targets += [
        Target(
            f"share of draws with the AUC of {task}, federated, at least the best site's",
            result.ratios[f"auc_{task}/federated-at-least-{BEST}"],
            1.0,
        )
        for task in TASKS
    ]
    return result


def task_run(task: str, seed: int) -> RunConfig:
    """Describe the run of a task."""
    weights = public_weights()
    text = (_PUBLIC if weights else _SCRATCH).format(stream=TASKS[task], weights=weights)
    table = parse_toml(f'name = "{task}"\nseed = {seed}\n{text}', "study")
    table["task"] = {"label": "class", "kind": "classes", "classes": classes_of(task)}
    return run_of_table(table, "study")


def pictures_of(task: str) -> list[Picture]:
    """The pictures of a task's modality."""
    return [picture for picture in read_pictures(real_data(FOLDER) / FOLDER) if picture["modality"] == task]


def classes_of(task: str) -> list[str]:
    """The classes of a task's pictures, in alphabetical order."""
    return sorted({picture["class"] for picture in pictures_of(task)})


def write_draw(job: CohortJob) -> Path:
    """Write the site folders of both tasks: `<task>/sites/<name>` and `<task>/holdout`."""
    source = real_data(FOLDER) / FOLDER
    for task, stream in TASKS.items():
        for place, pictures in draw_places(pictures_of(task), task, job.draw).items():
            split = "test" if place == "holdout" else "train"
            rows = [(Path(one["file"]).stem, stream, source / one["file"], split) for one in pictures]
            labels = [(Path(one["file"]).stem, one["class"]) for one in pictures]
            write_site_folder(job.folder / task / place, rows, ("class",), labels)
    return job.folder


def draw_places(pictures: Sequence[Picture], task: str, draw: int) -> dict[str, list[Picture]]:
    """Draw the training pictures of each site from the data's split `train`; all pictures of patients that no site has
    are held out.

    A site draws picture by picture by its own shares of the classes, as long as there are any of the class.
    """
    generator = numpy_generator(draw, "federated-fine-tuning", task)
    names = sorted({one["class"] for one in pictures})
    shuffled = [pictures[at] for at in generator.permutation(len(pictures))]
    pools = [[one for one in shuffled if (one["class"], one["split"]) == (name, "train")] for name in names]
    places: dict[str, list[Picture]] = {}
    for site in SITES:
        shares = generator.dirichlet(np.full(len(names), _CONCENTRATION))
        chosen = places[f"sites/{site}"] = []
        while len(chosen) < LABELS:
            left = shares * [len(pool) > 0 for pool in pools]
            chosen.append(pools[generator.choice(len(pools), p=left / left.sum())].pop())
    used = {one["subject_group"] for chosen in places.values() for one in chosen}
    return places | {"holdout": [one for one in pictures if one["subject_group"] not in used]}


def measure(job: ArmJob) -> dict[str, float]:
    """Train one arm, named `start/arm`, on both tasks, and score it on the held-out pictures."""
    measured, arm = {}, job.arm.rpartition("/")[2]
    for task in TASKS:
        described, cohort = task_run(task, job.seed), job.cohort / task
        model = train_arm(arm, described, cohort)
        place = TaskPlace.open(described, cohort / HOLDOUT, ("test",), HOLDOUT)
        for score in place.scores(arm, place.predict(model)):
            measured[f"{score.metric}_{task}"] = score.value
    return measured


def train_arm(arm: str, described: RunConfig, cohort: Path) -> PanModel:
    """Train the model of one arm."""
    if arm == "federated":
        return federate(described, cohort).model
    stores = {folder.name: open_training_store(folder, described) for folder in site_folders(cohort / "sites")}
    start = start_model(described).state_dict() if described.start else None
    if arm == "pooled":
        return train_together(described, list(stores.values()), start=start)
    name = arm.removeprefix("site:")
    return train_alone(described, stores[name], name, start=start)


def add_best_site(result: StudyResult) -> None:
    """Add the arm `best-site`: in each draw and metric the best of the sites' own models."""
    for metric in metrics(result):
        best = np.max([result.values[metric, f"site:{name}"] for name in SITES], axis=0)
        result.values[metric, BEST] = best.tolist()


def metrics(result: StudyResult) -> list[str]:
    """The metrics that were measured."""
    return list(dict.fromkeys(metric for metric, _ in result.values))
