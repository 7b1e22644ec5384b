"""Whether two run descriptions are the same, and which keys differ."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panfm.config.run_description import RunConfig
from panfm.errors import ConfigError

_FILLED_IN = ("start.sha256", "start.public", "start.parameters")
_MOST_NAMED = 3


def check_same_run(path: Path, run: RunConfig, bound: RunConfig) -> None:
    """Refuse to go on with a run under another description.

    Args:
        path: Of the description that was given, for the error.
        run: That description.
        bound: The one that the run began with.
    Raises:
        ConfigError: they differ; the line names up to three keys.
    """
    if changed := differences(run, bound):
        more = len(changed) - _MOST_NAMED
        names = "; ".join(changed[:_MOST_NAMED]) + (f"; {more} more keys" if more > 0 else "")
        remedy = "start a new run, or go on with more rounds by --extend rounds=N"
        raise ConfigError(f"{path}: differs from the run that began: {names}; {remedy}")


def differences(run: RunConfig, bound: RunConfig) -> list[str]:
    """Keys under which two descriptions differ, one line each; what is filled in of a start is left out."""
    changed = changed_keys(run, bound).items()
    return [f"{key}: found {given!r:.60}, expected {began!r:.60}" for key, (given, began) in changed]


def changed_keys(run: RunConfig, bound: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> its value in either description, of keys that `differences` tells; `nothing` if it is not set."""
    given, began = (_flat(one.model_dump(mode="json", by_alias=True, exclude_none=True)) for one in (run, bound))
    return {
        key: (given.get(key, "nothing"), began.get(key, "nothing"))
        for key in dict.fromkeys([*given, *began])
        if given.get(key) != began.get(key) and not key.startswith(_FILLED_IN)
    }


def _flat(table: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Values by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) and value else {f"{above}{key}": value}
    return flat
