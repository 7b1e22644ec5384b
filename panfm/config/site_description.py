"""The description of one site: where its data lies and what may leave it.

`site.toml` belongs to the hospital. What it forbids stays forbidden, whatever a run asks for.
"""

import os.path
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from panfm.config.base import Config, Name, Positive
from panfm.errors import ConfigError

RelativePath = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
Account = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
Limit = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0, le=2**53)]
Columns = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)] | Literal["all"]


class Releasable(StrEnum):
    """Everything that can leave a site. Nothing else has a name, so nothing else can be allowed."""

    UPDATES = "updates"
    """Local minus global parameters of the shared groups."""
    COUNTS = "counts"
    """Number of subjects, whole and per stream (they weigh the averages)."""
    LOSS = "loss"
    """Mean training and validation loss of the round, skipped steps."""
    SALIENCY = "saliency"
    """Mean saliency per stream."""
    MONITORS = "monitors"
    """Numbers that tell of a collapse: effective rank and deviation of the features of a round's last batch, entropy of
    a teacher, experts in use, what features tell only of the organs present; with `evaluation` the AUC of a probe on
    the val split (panfm/training/monitors.py)."""
    LABEL_SUMS = "label-sums"
    """Sums of features and labels over the labelled training patients, for a probe of all sites or the measure of a
    gate (panfm/evaluate/label_sums.py)."""
    INPUT_SUMS = "input-sums"
    """Sums of what the tokenizers read, and of its squares, over the training images of each stream, once before
    round 1 (panfm/evaluate/input_sums.py)."""
    EVALUATION = "evaluation"
    """AUC or R2 of a run's model on a column of labels, with its interval (panfm/site/evaluation_answer.py)."""


class LimitsConfig(Config):
    """Limits of the site, which win over whatever a run asks for."""

    may_leave: Annotated[tuple[Annotated[Releasable, Field(strict=False)], ...], Field(strict=False)] = (
        Releasable.UPDATES,
        Releasable.COUNTS,
        Releasable.LOSS,
        Releasable.SALIENCY,
    )
    """Kinds of content that may leave; updates and counts are needed to take part. `monitors`, `label-sums`,
    `input-sums` and `evaluation` leave only where they are named here."""
    epsilon: Annotated[float, Field(gt=0.0)] | None = None
    """Set it to take part in differentially private runs only, and to spend at most this over all of them. It says
    nothing without `delta` and `public-subjects`, which the server would choose otherwise."""
    delta: Annotated[float, Field(ge=1e-12, le=0.1)] | None = None
    """Largest chance that epsilon does not hold; the run's smaller one wins. At most 1 / (10 public-subjects)."""
    public_subjects: Annotated[int, Field(gt=0)] | None = None
    """Patients that the site is publicly known to have, instead of the private run's number."""
    training_labels: Columns = ()
    """Columns of the label table that a run's `[task]` may train on, none when left out; "all": any column."""
    evaluation_labels: Columns = ()
    """Columns of the label table on which a run's model may be evaluated, none when left out; "all": any column. With
    them `may-leave` names `evaluation`."""
    evaluations: Positive = 20
    """Models that are evaluated on one column, over all runs; one that was evaluated is so again."""
    smallest_batch: Positive = 8
    """Fewest subjects with a loss in a batch, behind a stream's or expert's update of a round, and behind a loss or
    saliency, of a run that is not private. A private one takes part under this site's `epsilon`, or where both floors
    are 1."""
    smallest_steps: Positive = 5
    """Fewest local steps that make up a round's update of such a run."""
    runs_at_once: Positive = 1
    """Unfinished runs that may ask for rounds; `panfm site end` ends one."""
    idle_hours: Limit = 24.0
    """An unfinished run that has asked for no round for so long gives way to another."""
    devices: Annotated[int, Field(gt=0, le=64)] = 1
    """GPUs, or on a processor processes, that train a round together, each a part of every batch. With 2 or more, the
    site refuses runs whose batches cannot be split: private ones, and the objective `views`. `memory-gib` then holds
    for each process."""
    seconds_per_round: Limit = 86_400.0
    """A round, or a handshake with what it reads and prepares, that takes longer is given up."""
    memory_gib: Annotated[float, Field(ge=0.5)] | None = None
    """Memory that the resident worker may fill, in GiB, of which it needs about a half itself; a question that asks for
    more fails. Neither a GPU's memory nor what the system keeps of files that are read counts."""
    parameters: Count = 1_000_000_000
    """Numbers in the model of a run, experts included. A message to the worker holds at most twice as many."""
    voxels_per_image: Count = 512**3
    """Voxels, colours included, of one image as a run prepares it."""
    tokens_per_patient: Count = 65_536
    """Tokens of a patient with every stream of a run."""
    local_steps: Count = 10_000
    """Optimiser steps in a round."""
    rounds: Count = 100_000
    """Rounds of a run."""
    step_gib: Limit = 64.0
    """Memory of one local step of a whole batch, model and optimiser included, in GiB, counted generously before
    anything is built (panfm/models/sizes.py)."""
    state_gib: Limit = 200.0
    """Space of the private states of all runs on disk, in GiB. A run whose own need more, counted generously, is
    refused; those of runs longest idle, for `idle-hours` at least, are removed for it."""
    reading_threads: Annotated[int, Field(ge=0, le=64)] = 2
    """Threads that read images: all at once when prepared images are built, and ahead of the training steps that need
    them; with 0, one image or batch is read when it is needed. No result depends on it."""
    cache_gib: Limit = 1000.0
    """Space of all prepared images on disk, in GiB. The oldest of other runs are removed for those of a new one."""
    kept_runs: Count = 20
    """Runs whose private state is kept. For one more, that of the run longest idle is removed, if for `idle-hours` at
    least; else the new run is refused."""

    @model_validator(mode="after")
    def _epsilon_has_its_delta(self) -> Self:
        needed = {"delta": self.delta, "public-subjects": self.public_subjects}
        missing = " and ".join(key for key, value in needed.items() if value is None)
        if self.epsilon is not None and missing:
            raise ValueError(f"epsilon: limits nothing while the server chooses {missing}; add {missing}")
        if self.largest_delta is not None and self.delta is not None and self.delta > self.largest_delta:
            raise ValueError(
                f"delta: {self.delta:g} is above 1 / (10 public-subjects), set at most {self.largest_delta:.3g}"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_may_leave(self) -> Self:
        if self.evaluation_labels and Releasable.EVALUATION not in self.may_leave:
            raise ValueError('evaluation-labels: nothing leaves, expected "evaluation" in may-leave, or no columns')
        return self

    @property
    def largest_delta(self) -> float | None:
        """The largest delta that promises anything to the site's public number of patients; None if it has none."""
        return None if self.public_subjects is None else 0.1 / self.public_subjects


class WorkerConfig(Config):
    """The resident worker: who may ask it for a round, and where."""

    socket: RelativePath = ".panfm/run/worker.sock"
    """Unix socket, relative to this file; its folder is the worker's own."""
    users: Annotated[tuple[Account, ...], Field(strict=False)] = ()
    """Accounts, by name or number, that may ask besides the worker's own: the one under which Flower runs."""
    group: Account | None = None
    """Group, by name or number, that may reach the socket, when Flower runs under another account."""


class CoordinatorConfig(Config):
    """Where the coordinator is and how both know each other: for the SuperNode's command that `site start` prints."""

    address: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+:[0-9]{1,5}$")] = "coordinator.example.org:443"
    """Host and port."""
    root_certificates: RelativePath = "ca.crt"
    """The coordinator's certificate authority, relative to this file."""
    key: RelativePath = "supernode.key"
    """Private key of the site's SuperNode, relative to this file; the coordinator has registered its public half."""


class SiteConfig(Config):
    """One site folder."""

    name: Name
    """Stable name, known to the coordinator."""
    manifest: RelativePath = "manifest.csv"
    """Table of images, relative to this file: one row per subject and stream."""
    labels: RelativePath | None = None
    """Optional table of labels for probes, relative to this file; never leaves the site."""
    constant_images: Literal["refuse", "take"] = "refuse"
    """Whether a run refuses an image that has the same value everywhere, or uses it like any other."""
    float_images: Literal["float32", "float16"] = "float32"
    """How prepared images are kept whose sources are not integers of 8 or 16 bits, which are kept in as many bits.
    float16 takes half of the space, and rounds to 3 digits."""
    cache_dir: RelativePath = ".panfm/cache"
    """Preprocessed images, relative to this file."""
    state_dir: RelativePath = ".panfm/state"
    """Private training state, relative to this file."""
    ledger_dir: RelativePath = ".panfm/ledger"
    """Record of the privacy spent by all runs on these patients, relative to this file. Back it up; never delete it."""
    limits: LimitsConfig = LimitsConfig()
    worker: WorkerConfig = WorkerConfig()
    coordinator: CoordinatorConfig = CoordinatorConfig()


def site_folders(folder: Path) -> list[Path]:
    """The site folders under a folder, by name. Raises ConfigError if there is none."""
    if not (folders := sorted(path.parent for path in folder.glob("*/site.toml"))):
        raise ConfigError(f"{folder}: holds no site, expected folders with a site.toml")
    return folders


def site_path(folder: Path, relative: str) -> Path:
    """A path named in `site.toml`, resolved against the site folder."""
    return Path(os.path.realpath(folder / relative))  # Path.resolve raises for a circle of links, open() tells better
