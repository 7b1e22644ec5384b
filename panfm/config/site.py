"""The description of one site: where its data lies and what may leave it.

`site.toml` belongs to the hospital. What it forbids stays forbidden, whatever a run asks for.
"""

import os.path
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import Field

from panfm.config._base import Config, Name
from panfm.errors import ConfigError

RelativePath = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]


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
    limits: LimitsConfig = LimitsConfig()


def site_folders(folder: Path) -> list[Path]:
    """The site folders under a folder, by name. Raises ConfigError if there is none."""
    if not (found := sorted(path.parent for path in folder.glob("*/site.toml"))):
        raise ConfigError(f"{folder}: holds no site, expected folders with a site.toml")
    return found


def site_path(folder: Path, relative: str) -> Path:
    """A path named in `site.toml`, resolved against the site folder."""
    return Path(os.path.realpath(folder / relative))  # Path.resolve raises for a circle of links, open() tells better
