"""The plug-in points: for each, the known names and where the class of each name is defined.

A class is imported when it is first asked for, so that reading a run description imports no torch. To add a plug-in,
write its file and add a line to its table here, or call `register` before the run description is read.
"""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from panfm.errors import ConfigError


class Registry:
    """Name -> class. An unknown name is an error, never a default."""

    def __init__(self, key: str, built_in: Mapping[str, str]) -> None:
        """Start with the built-in plug-ins.

        Args:
            key: Key of the run description that chooses one, for error messages.
            built_in: Name -> `package.module:Class`.
        """
        self.key = key
        self._targets: dict[str, str | type] = dict(built_in)

    @property
    def names(self) -> tuple[str, ...]:
        """All known names, built-in ones first."""
        return tuple(self._targets)

    def register(self, name: str, target: str | type) -> None:
        """Add a plug-in: a class, or `package.module:Class`. Raises ConfigError if the name is taken."""
        if name in self._targets:
            raise ConfigError(f"{self.key}: {name!r} is registered already, expected another name")
        self._targets[name] = target

    def check(self, name: str) -> str:
        """Return a known name. Raises ConfigError, naming the nearest known one, for any other."""
        if name not in self._targets:
            near = difflib.get_close_matches(name[:64], self._targets, n=1, cutoff=0.4)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{self.key}: found {name!r:.80}, expected one of {', '.join(self.names)}{hint}")
        return name

    def load(self, name: str) -> Any:
        """Import and return the class of a name. Raises ConfigError for an unknown name."""
        target = self._targets[self.check(name)]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = getattr(importlib.import_module(module), attribute)
            self._targets[name] = target
        return target


MEANS = Registry(
    "sharing.mean",
    {
        "weighted": "strategies.weighted_means:WeightedMean",
        "median": "strategies.robust_means:CoordinateMedian",
        "trimmed": "strategies.robust_means:TrimmedMean",
        "geometric-median": "strategies.robust_means:GeometricMedian",
        "l-dawa": "strategies.weighted_means:LayerwiseMean",
    },
)
"""Means of a group's updates (`strategies.group_means`)."""
