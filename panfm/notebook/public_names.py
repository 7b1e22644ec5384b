"""The names of the package `panfm` itself, each imported when it is first used."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from panfm.registry import BACKBONES, MASKING_POLICIES, MEANS, OBJECTIVES, READERS, Registry, import_class

Class = TypeVar("Class", bound=type)
_TARGETS = {
    "load": "panfm.notebook.loaded_model:load",
    "Model": "panfm.notebook.loaded_model:Model",
    "runs": "panfm.notebook.run_tables:runs",
}
_POINTS = {
    "objective": OBJECTIVES,
    "masking": MASKING_POLICIES,
    "backbone": BACKBONES,
    "mean": MEANS,
    "reader": READERS,
}
PUBLIC_NAMES = (*_TARGETS, *_POINTS)
"""All public names of the package `panfm` that are not modules."""


def public_name(name: str) -> Any:
    """The function or class of a public name. Raises AttributeError for any other."""
    if name in _POINTS:
        return partial(plug_in, _POINTS[name])
    if name not in _TARGETS:
        raise AttributeError(f"module 'panfm' has no attribute {name!r}")
    return import_class(_TARGETS[name])


def plug_in(registry: Registry, name: str) -> Callable[[Class], Class]:
    """Decorate a class to register it under a name; a cell of a notebook that runs again replaces its class.

    Raises:
        ConfigError: another class has the name.
    """

    def register(kind: Class) -> Class:
        registry.register(name, kind)
        return kind

    return register
