"""Plug-ins of installed packages: their entry points, read when a name is asked for that no table of ours has.

A package announces a class by an entry point in the group of its plug-in point:

    [project.entry-points."panfm.objectives"]
    mine = "my_package.objective:MyConfig"
"""

from functools import cache
from importlib.metadata import entry_points

from panfm.errors import ConfigError, PanfmError, one_line

GROUPS = {
    "objective.name": "panfm.objectives",
    "masking.policy": "panfm.masking",
    "model.backbone": "panfm.backbones",
    "sharing.mean": "panfm.means",
    "image reader": "panfm.readers",
    "tracking.loggers": "panfm.loggers",
    "cohort.kind": "panfm.cohorts",
}
"""Key of a registry -> group of entry points."""


@cache
def installed_plug_ins(key: str) -> dict[str, str]:
    """Name -> `package.module:Class` of the installed plug-ins of a registry; nothing is imported."""
    return {point.name: point.value for point in entry_points(group=GROUPS[key])} if key in GROUPS else {}


def check_import(key: str, name: str, error: Exception) -> None:
    """Raise ConfigError in place of an error that importing a plug-in raised, if it is one of an installed package."""
    target = installed_plug_ins(key).get(name)
    if target is not None and not isinstance(error, PanfmError | MemoryError):
        raise ConfigError(f"{key}: {name!r} ({target}) cannot be imported: {one_line(repr(error))}") from error
