"""The plug-in points: for each, the known names and where the class of each name is defined.

A class is imported when it is first asked for, so that reading a run description imports no torch. Plug-ins come from

    the tables in this file     those of this library
    installed packages          entry points (panfm/installed_plug_ins.py), read when a name is asked for that no table
                                has, or an image that no reader of ours accepts
    a notebook or a script      `@panfm.objective("mine")` and the like, or `register`
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
        self.built_in = tuple(built_in)
        self._targets: dict[str, str | type] = dict(built_in)

    @property
    def names(self) -> tuple[str, ...]:
        """All known names, built-in ones first."""
        return tuple(self._targets)

    def register(self, name: str, target: str | type) -> None:
        """Add a plug-in: a class, or `package.module:Class`. Raises ConfigError if another class has the name."""
        if _place(self._targets.get(name, target)) != _place(target):
            raise ConfigError(f"{self.key}: {name!r} is registered already, expected another name for {_place(target)}")
        self._targets[name] = target

    def add_installed(self) -> list[str]:
        """Learn the plug-ins of installed packages; returns the names that are new, and imports no plug-in.

        Raises:
            ConfigError: a package has the name of another plug-in.
        """
        from panfm.installed_plug_ins import installed_plug_ins

        known = self.names
        for name, target in installed_plug_ins(self.key).items():
            self.register(name, target)
        return [name for name in self.names if name not in known]

    def check(self, name: str) -> str:
        """Return a known name. Raises ConfigError, naming the nearest known one, for any other."""
        if isinstance(name, str) and (name in self._targets or name in self.add_installed()):
            return name
        near = difflib.get_close_matches(str(name)[:64], self._targets, n=1, cutoff=0.4)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{self.key}: found {name!r:.80}, expected one of {', '.join(self.names)}{hint}")

    def load(self, name: str) -> Any:
        """Import and return the class of a name. Raises ConfigError for an unknown name, or an installed plug-in that
        cannot be imported."""
        try:
            return import_class(self._targets[self.check(name)])
        except Exception as error:
            from panfm.installed_plug_ins import check_import

            check_import(self.key, name, error)
            raise


def import_class(target: str | type) -> Any:
    """The class that `package.module:Class` names; a class as it is."""
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _place(target: str | type) -> str:
    """`package.module:Class` of a plug-in."""
    return target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"


OBJECTIVES = Registry(
    "objective.name",
    {
        "latent": "panfm.training.objectives.latent.config:LatentConfig",
        "dino": "panfm.training.objectives.dino.config:DinoConfig",
        "mae": "panfm.training.objectives.mae.config:MaeConfig",
        "views": "panfm.training.objectives.views.config:ViewsConfig",
        "view-regression": "panfm.training.objectives.view_regression.config:ViewRegressionConfig",
        "supervised": "panfm.training.objectives.supervised.config:SupervisedConfig",
    },
)
"""Config classes of the objectives (`panfm.config.objective`)."""

MASKING_POLICIES = Registry(
    "masking.policy",
    {
        "random": "panfm.training.policies:RandomPolicy",
        "organ": "panfm.training.policies:OrganPolicy",
        "sgm": "panfm.training.policies:SaliencyPolicy",
        "inverse": "panfm.training.policies:InversePolicy",
        "static": "panfm.training.policies:StaticPolicy",
    },
)
"""Masking policies (`panfm.training.policies`)."""

READERS = Registry(
    "image reader",
    {"nifti": "panfm.data.readers.nifti:NiftiReader", "pictures": "panfm.data.readers.picture:PictureReader"},
)
"""Kinds of images that a manifest may name; the first that accepts a path reads it."""

BACKBONES = Registry(
    "model.backbone",
    {
        "dense": "panfm.models.vit:VisionTransformer",
        "director-experts": "panfm.models.director_experts:DirectorExpertsBackbone",
    },
)
"""Subclasses of `panfm.models.backbone.Backbone`."""

MEANS = Registry(
    "sharing.mean",
    {
        "weighted": "strategies.group_means:WeightedMean",
        "median": "strategies.group_means:CoordinateMedian",
        "trimmed": "strategies.group_means:TrimmedMean",
        "geometric-median": "strategies.group_means:GeometricMedian",
        "l-dawa": "strategies.group_means:LayerwiseMean",
    },
)
"""Means of a group's updates (`strategies.group_means`)."""
