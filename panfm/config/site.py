"""The description of one site: where its data lies and what may leave it.

`site.toml` belongs to the hospital. What it forbids stays forbidden, whatever a run asks for.
"""

import os.path
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import Field

from panfm.config._base import Config, Name, Positive
from panfm.errors import ConfigError

RelativePath = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
Account = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Limit = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


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


class LimitsConfig(Config):
    """What the site allows."""

    may_leave: Annotated[tuple[Annotated[Releasable, Field(strict=False)], ...], Field(strict=False)] = tuple(
        Releasable
    )
    """Kinds of content that may leave; updates and counts are needed to take part."""
    epsilon: Annotated[float, Field(gt=0.0)] | None = None
    """Set it to take part in differentially private runs only, and to spend at most this over all of them."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Largest chance that epsilon does not hold; the run's smaller one wins."""
    public_subjects: Annotated[int, Field(gt=0)] | None = None
    """Patients that the site is publicly known to have, instead of the private run's number."""
    experiments: Annotated[tuple[Hash, ...], Field(strict=False)] = ()
    """Experiments that may run here, by hash, as `panfm site dry-run` prints it; empty: any."""
    smallest_batch: Positive = 8
    """Fewest training subjects in a batch, behind a stream's update of a round, and behind a loss or saliency, of a run
    whose noise this site's `epsilon` does not bound."""
    smallest_steps: Positive = 5
    """Fewest local steps that make up a round's update of such a run."""
    runs_at_once: Positive = 1
    """Unfinished runs that may ask for rounds; `panfm site end` ends one."""
    idle_hours: Limit = 24.0
    """An unfinished run that has asked for no round for so long gives way to another."""
    seconds_per_round: Limit | None = None
    """A round that takes longer is given up."""
    memory_gib: Limit | None = None
    """Memory that the resident worker may fill, in GiB; a round that asks for more fails."""


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
    if not (found := sorted(path.parent for path in folder.glob("*/site.toml"))):
        raise ConfigError(f"{folder}: holds no site, expected folders with a site.toml")
    return found


def site_path(folder: Path, relative: str) -> Path:
    """A path named in `site.toml`, resolved against the site folder."""
    return Path(os.path.realpath(folder / relative))  # Path.resolve raises for a circle of links, open() tells better
