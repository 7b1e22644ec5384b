"""Read descriptions from TOML into frozen objects, or complain in one line per fault; write them and hash them.

Files that describe runs are read by `run_file.py`: a site is sent the text.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import ValidationError, create_model

from panfm.config.base import Config
from panfm.config.run_description import RunConfig
from panfm.config.site_description import SiteConfig
from panfm.errors import ConfigError, reason
from panfm.texts import parse_toml, read_text

C = TypeVar("C", bound=Config)


def load_site(folder: Path) -> SiteConfig:
    """Read `site.toml` of a site folder. Raises ConfigError as `load_run` does."""
    return parse_site(read_site_text(folder), str(folder / "site.toml"))


def read_site_text(folder: Path) -> str:
    """Read the text of `site.toml`, as `parse_site` takes it. Raises ConfigError: it is absent or cannot be read."""
    return read_file(folder / "site.toml")


def parse_site(text: str, where: str = "site description") -> SiteConfig:
    """Read a site description from TOML text. Raises ConfigError as `load_run` does."""
    return validate(SiteConfig, parse_toml(text, where), where)


def parse_run(text: str) -> RunConfig:
    """Read a run description from TOML text. Raises ConfigError as `load_run` does."""
    return validate(RunConfig, parse_toml(text, "run description"), "run description")


def parse_table(kind: type[C], table: Mapping[str, Any], where: str, *, key: str) -> C:
    """Read one table of a description that stands under `key`. Raises ConfigError as `load_run` does."""
    fields: dict[str, Any] = {key: (kind, ...)}
    description = create_model("Description", __base__=Config, **fields)
    parsed: C = getattr(validate(description, {key: table}, where), key)
    return parsed


def dump_toml(config: Config) -> str:
    """The description as TOML text, defaults included; `parse_run` reads a run's back to an equal object."""
    return tomli_w.dumps(config.model_dump(mode="json", by_alias=True, exclude_none=True))


def as_told(run: RunConfig) -> RunConfig:
    """Return the description that sites are sent: without the coordinator's loggers, the cohort, and the path of the
    start, which may name folders of one machine."""
    start = run.start and run.start.model_copy(update={"model": None})
    return run.model_copy(update={"cohort": None, "start": start, "tracking": None})


def without_summed_constants(run: RunConfig) -> RunConfig:
    """Return the description as it was before `input-centre` and `input-scale` were computed from the sites' sums."""
    streams = {
        name: stream.model_copy(update={"input_centre": None, "input_scale": None})
        if stream.input_constants
        else stream
        for name, stream in run.streams.items()
    }
    return run.model_copy(update={"streams": streams})


def experiment_hash(run: RunConfig) -> str:
    """Hash of an experiment: hex SHA-256 of the resolved description that operators can read before the run, without
    constants that are computed from the sites' sums. The same everywhere: at the coordinator, at every site, on pages
    and in logs."""
    return description_hash(without_summed_constants(run))


def description_hash(run: RunConfig) -> str:
    """Hex SHA-256 of the resolved description that sites are sent, with the constants of inputs that it has by now."""
    return hashlib.sha256(dump_toml(as_told(run)).encode()).hexdigest()


def read_file(path: Path) -> str:
    """Read the text of a description. Raises ConfigError: it is absent or cannot be read."""
    try:
        return read_text(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file, expected a TOML description") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({reason(error)})") from error


def validate(kind: type[C], table: Mapping[str, Any], where: str) -> C:
    """Check a table as a description of a kind. Raises ConfigError: one line per fault, each beginning with `where`."""
    try:
        return kind.model_validate(table, by_alias=True, by_name=False)
    except ValidationError as error:
        from panfm.config.complaints import complaints  # a description that holds does without

        lines = complaints(kind, error, table)
    raise ConfigError("\n".join(f"{where}: {line}" for line in lines))  # not `from`: pydantic's text has no end
