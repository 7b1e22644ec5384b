"""The base class of all kinds of cohorts, cohorts that exist already, and parts that several kinds share.

A cohort is a folder that appears whole or not at all:

    cohort.toml            the description, numbers of subjects, and the meaning of every label
    sites/<site>/          site.toml  manifest.csv  labels.csv, and the images unless they are read in place
    holdout/               the same for patients at no site, on whom models are probed
"""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import Field, model_validator

from panfm.config import StreamConfig, load_site
from panfm.config.base import Config, Name
from panfm.errors import ConfigError
from panfm.outputs import new_folder

Streams = Mapping[str, StreamConfig]
Progress = Callable[[int, int], None]
"""Called with (images written, images in all)."""
VALIDATION_EVERY = 10
"""Every tenth phantom patient of a site, or of a stream at a site, is its validation split."""


class CohortSource(Config):
    """The `[cohort]` table of a run: describes a cohort, and writes it. The same description gives the same bytes."""

    @abstractmethod
    def write(self, folder: Path, streams: Streams, progress: Progress = lambda *_: None) -> None:
        """Write the cohort.

        Args:
            folder: Must not exist.
            streams: The run's.
            progress: Told how much is written.
        Raises:
            ConfigError: the real images that the cohort consists of are not there.
            DataError: the folder exists or cannot be written, or the cohort has no images of a stream.
        """

    @abstractmethod
    def fingerprint(self) -> list[object]:
        """Values for JSON that change when the same description would give another cohort: code, and real images."""

    def check(self, streams: Streams) -> None:
        """Raise ConfigError if the description does not go with the run's streams."""

    @property
    def existing(self) -> Path | None:
        """The folder of a cohort that exists already and is not to be written."""
        return None

    def table(self) -> dict[str, Any]:
        """The description as it stands in TOML, defaults included."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def write_description(self, folder: Path, **more: Mapping[str, Any]) -> None:
        """Write `cohort.toml`: the description, and tables about what was written."""
        (folder / "cohort.toml").write_text(tomli_w.dumps(self.table() | more), encoding="utf-8")


class FolderCohort(CohortSource):
    """Sites that exist already: `sites/<name>/` and optionally `holdout/` under one folder, or a list of site folders.

    A list becomes a cohort folder of links, so that sites may lie anywhere; nothing is copied.
    """

    kind: Literal["folder"]
    path: str | None = None
    """Folder that holds `sites/` and `holdout/`."""
    sites: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    """Site folders, wherever they are; instead of `path`."""
    holdout: str | None = None
    """Folder of the held-out subjects, beside `sites`; the model is not probed without."""

    @model_validator(mode="after")
    def _one_way_to_name_sites(self) -> Self:
        if (self.path is None) == (self.sites is None) or (self.holdout and self.sites is None):
            raise ValueError('expected either path = "FOLDER" or sites = ["SITE", ...], the latter maybe with holdout')
        return self

    def write(self, folder: Path, streams: Streams, progress: Progress = lambda *_: None) -> None:
        """Write the links to a list of sites. Raises ConfigError: `path` names a cohort that exists already."""
        if self.sites is None:
            raise ConfigError(f"cohort.path: {self.path} exists already, expected a cohort to write")
        with new_folder(folder) as made:
            (made / "sites").mkdir()
            for name, site in self._by_name().items():
                (made / "sites" / name).symlink_to(site)
            if self.holdout:
                (made / "holdout").symlink_to(Path(self.holdout).resolve())
            self.write_description(made)

    def check(self, streams: Streams) -> None:
        """Raise ConfigError if a folder of the list is no site, or two have one name."""
        self._by_name()
        if self.holdout:
            require_site(Path(self.holdout))

    def fingerprint(self) -> list[object]:
        """Return where the sites of a list lie; the folders are used as they are."""
        return [(name, str(site)) for name, site in self._by_name().items()]

    @property
    def existing(self) -> Path | None:
        """The folder under which all sites lie; None of a list of sites."""
        return None if self.path is None else Path(self.path)

    def _by_name(self) -> dict[str, Path]:
        """Name of each site of the list -> its folder."""
        folders = [Path(site).resolve() for site in self.sites or ()]
        for folder in folders:
            require_site(folder)
        by_name = {load_site(folder).name: folder for folder in folders}
        if len(by_name) < len(folders):
            raise ConfigError("sites: two of the folders have the same name in site.toml, expected a name for each")
        return by_name


def require_site(folder: Path) -> None:
    """Raise ConfigError if a folder has no `site.toml`."""
    if not (folder / "site.toml").is_file():
        raise ConfigError(f"{folder}: holds no site.toml, expected a site folder; `panfm site init {folder}` makes one")


class StreamSiteConfig(Config):
    """One hospital that has images of some streams."""

    streams: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """Streams it has images of."""


class StreamCohort(CohortSource):
    """A cohort whose sites are described by their streams; every patient has one image."""

    held_out: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Streams that no site has. The holdout folder has training images of them too, so that a probe can be fitted."""
    sites: Mapping[Name, StreamSiteConfig]

    @property
    def named_streams(self) -> tuple[str, ...]:
        """Every stream of a site or of the holdout, in the order of the description."""
        at_sites = [stream for site in self.sites.values() for stream in site.streams]
        return tuple(dict.fromkeys([*at_sites, *self.held_out]))

    def check(self, streams: Streams) -> None:
        """Raise ConfigError if a stream of the cohort is not described in the run."""
        if unknown := [stream for stream in self.named_streams if stream not in streams]:
            raise ConfigError(f"stream {unknown[0]!r} is not in streams {list(streams)}")

    @model_validator(mode="after")
    def _no_site_has_a_held_out_stream(self) -> Self:
        refuse_holdout(self.sites)
        for name, site in self.sites.items():
            if both := [stream for stream in site.streams if stream in self.held_out]:
                raise ValueError(f"sites.{name}.streams: {both[0]!r} is held out, expected no site to have it")
        return self


def ticker(progress: Progress, total: int) -> Callable[[], None]:
    """A function that is called after each image, and tells how many are written."""
    numbers = itertools.count(1)
    return lambda: progress(next(numbers), total)


def site_split(number: int) -> str:
    """Split of a site's phantom patient by its number."""
    return "val" if number % VALIDATION_EVERY == VALIDATION_EVERY - 1 else "train"


def refuse_holdout(sites: Iterable[str]) -> None:
    """Raise ValueError if a site has the name that the held-out patients have."""
    if "holdout" in sites:
        raise ValueError("sites.holdout: the name of the held-out patients, expected another")


def texts_of(paths: Iterable[Path]) -> list[object]:
    """Contents of source files, for a fingerprint."""
    return [path.read_text(encoding="utf-8") for path in sorted(paths)]


def listing_of(folder: Path, pattern: str) -> list[object]:
    """All files under a folder with what changes when they do, for a fingerprint."""
    from panfm.data.readers import file_fingerprint  # brings numpy

    return [file_fingerprint(path) for path in sorted(folder.rglob(pattern)) if path.is_file()]
