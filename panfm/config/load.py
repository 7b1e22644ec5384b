"""TOML in, a frozen description out, or a complaint of one line per fault.

A complaint names the dotted key as it is written in TOML, what was found and what was expected; for an unknown key it
names the nearest known one.
"""

import difflib
import hashlib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from panfm.config.base import Config, UnknownNameError
from panfm.config.run import RunConfig
from panfm.config.site import SiteConfig
from panfm.errors import ConfigError, one_line
from panfm.texts import check_text, parse_toml, read_text

C = TypeVar("C", bound=Config)
_MAX_COMPLAINTS = 20
_MAX_KEY = 64
"""Characters of an unknown key that are compared to the known ones."""


def load_run(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run description and apply `key.sub-key=value` overrides.

    Raises:
        ConfigError: the file is absent or not TOML, a key is unknown, a value is out of range, or a model to start from
            cannot be read.
    """
    run = _with_start_hash(_validate(RunConfig, _override(_read(path), overrides), str(path)))
    check_text(dump_toml(run), f"{path}: with all defaults")
    return run


def load_site(folder: Path) -> SiteConfig:
    """Read `site.toml` of a site folder. Raises ConfigError as `load_run` does."""
    return _validate(SiteConfig, _read(folder / "site.toml"), str(folder / "site.toml"))


def parse_site(text: str, where: str = "site description") -> SiteConfig:
    """Read a site description from TOML text. Raises ConfigError as `load_run` does."""
    return _validate(SiteConfig, parse_toml(text, where), where)


def parse_run(text: str, where: str = "run description") -> RunConfig:
    """Read a run description from TOML text. Raises ConfigError as `load_run` does."""
    return _validate(RunConfig, parse_toml(text, where), where)


def dump_toml(config: Config) -> str:
    """The description as TOML text, defaults included; `parse_run` reads a run's back to an equal object."""
    return tomli_w.dumps(config.model_dump(mode="json", by_alias=True, exclude_none=True))


def config_hash(config: Config) -> str:
    """Hex SHA-256 of the resolved text: equal descriptions hash alike."""
    return hashlib.sha256(dump_toml(config).encode()).hexdigest()


def as_told(run: RunConfig) -> RunConfig:
    """A run as sites are told of it: without its cohort and the place of its start, which are a matter of one machine
    and may name its folders."""
    start = run.start and run.start.model_copy(update={"model": None})
    return run.model_copy(update={"cohort": None, "start": start})


def experiment_hash(run: RunConfig) -> str:
    """Hash of a run as sites are told of it."""
    return config_hash(as_told(run))


def _with_start_hash(run: RunConfig) -> RunConfig:
    if run.start is None or run.start.model is None or run.start.sha256 is not None:
        return run
    path = Path(run.start.model) / "model.safetensors"
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(
            f"start.model: {path} cannot be read ({error.strerror}), expected a model's weights"
        ) from error
    return run.model_copy(update={"start": run.start.model_copy(update={"sha256": found})})


def _read(path: Path) -> dict[str, Any]:
    try:
        return parse_toml(read_text(path), str(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file, expected a TOML description") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({type(error).__name__})") from error


def _override(table: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {override!r}: expected key=value, e.g. train.rounds=3")
        *parents, last = key.strip().split(".")
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
        faults = error.errors(include_url=False)
        told = [one_line(_complaint(kind, fault, table), limit=1000) for fault in faults[:_MAX_COMPLAINTS]]
        lines = [f"{where}: {line}" for line in told]
        if more := len(faults) - len(lines):
            lines.append(f"{where}: {more} more faults")
        raise ConfigError("\n".join(lines)) from None  # pydantic's own text has lines without end


def _complaint(kind: type[BaseModel], fault: Any, table: Any) -> str:
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, UnknownNameError):
        return str(cause)
    keys, around, here = _locate(kind, fault["loc"], table)
    key = ".".join(keys)
    if fault["type"] == "extra_forbidden":
        known = sorted({known for member in around for known in _fields(member)})
        near = difflib.get_close_matches(keys[-1][:_MAX_KEY], known, n=1, cutoff=0.4)
        hint = f"did you mean {'.'.join([*keys[:-1], near[0]])}?" if near else f"known: {', '.join(known)}"
        return f"{key}: unknown key, {hint}"
    if fault["type"].startswith("union_tag"):
        tag = fault["ctx"]["discriminator"].strip("'")
        found = f"{fault['ctx']['tag']!r}" if "tag" in fault["ctx"] else "nothing"
        return f"{key}.{tag}: found {found}, expected one of {', '.join(_tags(here, tag))}"
    message = fault["msg"].removeprefix("Value error, ")
    is_whole_table = fault["type"] == "value_error" and isinstance(fault["input"], dict)
    found = "" if fault["type"] == "missing" or is_whole_table else f" (got {fault['input']!r:.80})"
    return f"{key}: {message}{found}" if key else message


def _locate(kind: type[BaseModel], location: Iterable[object], table: Any) -> tuple[list[str], list[Any], list[Any]]:
    """The keys as TOML has them, and the models and dicts around and at the last one.

    Pydantic's location also names the chosen member of a union, and `[key]` where a key itself is at fault.
    """
    keys: list[str] = []
    around: list[Any] = []
    here: list[Any] = [kind]
    for part in map(str, location):
        below = [found for member in here for found in _descend(member, part)]
        if not below and len(here) > 1:
            here = [member for member in here if part in _literals(member)]
        elif part != "[key]":
            keys.append(part)
            table = table.get(part) if isinstance(table, Mapping) else None
            around, here = here, [_chosen(member, table) for each in below for member in _members(each)]
    return keys, around, here


def _chosen(member: Any, table: Any) -> Any:
    """The class that reads a table: the one that its name chooses, where a model is the base of plug-ins."""
    return member.chosen(table) if hasattr(member, "chosen") else member


def _tags(union: list[Any], tag: str) -> list[str]:
    """Values that choose a member of a union."""
    return [value for member in union for value in typing.get_args(_fields(member).get(tag))]


def _literals(model: Any) -> list[str]:
    values = [typing.get_args(annotation) for annotation in _fields(model).values()]
    return [value for group in values for value in group if isinstance(value, str)]


def _descend(member: Any, step: str) -> list[Any]:
    """What may stand under one key: the field of that name, or the value type of a table with free keys."""
    if typing.get_origin(member) is dict:
        return [typing.get_args(member)[1]]
    fields = _fields(member)
    return [fields[step]] if step in fields else []


def _members(annotation: Any) -> list[Any]:
    """Models and dicts inside unions and annotations."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation] if is_model or origin is dict else []


def _fields(model: Any) -> dict[str, Any]:
    fields = getattr(model, "model_fields", {})
    return {field.alias or name: field.annotation for name, field in fields.items()}
