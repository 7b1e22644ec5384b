"""Read descriptions from TOML into frozen objects, or complain in one line per fault; write them and hash them."""

import hashlib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import ValidationError, create_model

from panfm.config.base import Config
from panfm.config.run_description import RunConfig
from panfm.config.site_description import SiteConfig
from panfm.config.start import is_public, weights_file
from panfm.errors import ConfigError, reason
from panfm.texts import check_text, parse_toml, read_text, toml_names

C = TypeVar("C", bound=Config)


def load_run(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run description and apply `key.sub-key=value` overrides.

    Raises:
        ConfigError: the file is absent or not TOML, a key is unknown, a value is out of range, a model to start from
            cannot be read, or the run starts from public weights and does not say which part it trains.
    """
    return run_of_table(read_description(path, overrides), str(path))


def read_description(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a run description as TOML has it, with overrides. Raises ConfigError: it is absent or not TOML."""
    return _override(_read(path), overrides)


def run_of_table(table: Mapping[str, Any], where: str) -> RunConfig:
    """Check a run description that `read_description` read. Raises ConfigError as `load_run` does."""
    run = _with_start_hash(_validate(RunConfig, table, where))
    check_text(dump_toml(run), f"{where}: with all defaults")
    return run


def load_site(folder: Path) -> SiteConfig:
    """Read `site.toml` of a site folder. Raises ConfigError as `load_run` does."""
    return parse_site(read_site_text(folder), str(folder / "site.toml"))


def read_site_text(folder: Path) -> str:
    """Read the text of `site.toml`, as `parse_site` takes it. Raises ConfigError: it is absent or cannot be read."""
    return _read_text(folder / "site.toml")


def parse_site(text: str, where: str = "site description") -> SiteConfig:
    """Read a site description from TOML text. Raises ConfigError as `load_run` does."""
    return _validate(SiteConfig, parse_toml(text, where), where)


def parse_run(text: str) -> RunConfig:
    """Read a run description from TOML text. Raises ConfigError as `load_run` does."""
    return _validate(RunConfig, parse_toml(text, "run description"), "run description")


def parse_table(kind: type[C], table: Mapping[str, Any], where: str, *, key: str) -> C:
    """Read one table of a description that stands under `key`. Raises ConfigError as `load_run` does."""
    fields: dict[str, Any] = {key: (kind, ...)}
    description = create_model("Description", __base__=Config, **fields)
    parsed: C = getattr(_validate(description, {key: table}, where), key)
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


def _with_start_hash(run: RunConfig) -> RunConfig:
    if run.start is None or run.start.model is None or run.start.sha256 is not None:
        return run
    model = Path(run.start.model)
    model = model / "model" if (model / "model").is_dir() else model
    path = weights_file(model)
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(
            f"start.model: {path} cannot be read ({error.strerror}), expected a model's weights"
        ) from error
    known = {"model": str(model), "sha256": digest, "public": is_public(model)}
    if known["public"] and "parts" not in run.train.model_fields_set:
        raise ConfigError('train.parts: missing, expected the part of public weights to train, e.g. { kind = "norms" }')
    return run.model_copy(update={"start": run.start.model_copy(update=known)})


def _read(path: Path) -> dict[str, Any]:
    return parse_toml(_read_text(path), str(path))


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file, expected a TOML description") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({reason(error)})") from error


def _override(table: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {override!r}: expected key=value, e.g. train.rounds=3")
        *parents, last = toml_names(key)
        node = table
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {override!r}: {parent} is a value, not a table")
        node[last] = _literal(value.strip())
    return table


def _literal(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError, KeyError):
        return text


def _validate(kind: type[C], table: Mapping[str, Any], where: str) -> C:
    try:
        return kind.model_validate(table, by_alias=True, by_name=False)
    except ValidationError as error:
        from panfm.config.complaints import complaints  # a description that holds does without

        lines = complaints(kind, error, table)
    raise ConfigError("\n".join(f"{where}: {line}" for line in lines))  # not `from`: pydantic's text has no end
