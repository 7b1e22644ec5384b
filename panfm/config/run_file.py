"""Files that describe runs, as coordinators and researchers have them: overrides, and the model to start from."""

import hashlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from panfm.config.load import dump_toml, read_file, validate
from panfm.config.run_description import RunConfig
from panfm.config.start import is_public, weights_file
from panfm.errors import ConfigError
from panfm.texts import check_text, parse_toml

_NAME = re.compile(r'\.(?:"([^"]*)"|([^.]*))')
"""A name of a dotted key, after its dot."""


def load_run(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run description and apply `key.sub-key=value` overrides.

    Raises:
        ConfigError: the file is absent or not TOML, a key is unknown, a value is out of range, a model to start from
            cannot be read, or the run starts from public weights and does not say which part it trains.
    """
    return run_of_table(read_description(path, overrides), str(path))


def read_description(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a run description as TOML has it, with overrides. Raises ConfigError: it is absent or not TOML."""
    return _override(parse_toml(read_file(path), str(path)), overrides)


def run_of_table(table: Mapping[str, Any], where: str) -> RunConfig:
    """Check a run description that `read_description` read. Raises ConfigError as `load_run` does."""
    run = _with_start_hash(validate(RunConfig, table, where))
    check_text(dump_toml(run), f"{where}: with all defaults")
    return run


def toml_names(key: str) -> list[str]:
    """The names of a dotted key; a dot within double quotes is part of a name."""
    return [quoted or plain for quoted, plain in _NAME.findall(f".{key.strip()}")]


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
