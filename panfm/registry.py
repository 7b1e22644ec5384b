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
        if not isinstance(name, str) or name not in self._targets:
            near = difflib.get_close_matches(str(name)[:64], self._targets, n=1, cutoff=0.4)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{self.key}: found {name!r:.80}, expected one of {', '.join(self.names)}{hint}")
        return name

    def load(self, name: str) -> Any:
        """Import and return the class of a name. Raises ConfigError for an unknown name."""
        self._targets[name] = target = import_class(self._targets[self.check(name)])
        return target


def import_class(target: str | type) -> Any:
    """The class that `package.module:Class` names; a class as it is."""
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


OBJECTIVES = Registry(
    "objective.name",
    {
        "latent": "panfm.training.objectives.latent.config:LatentConfig",
        "dino": "panfm.training.objectives.dino.config:DinoConfig",
        "mae": "panfm.training.objectives.mae.config:MaeConfig",
        "views": "panfm.training.objectives.views.config:ViewsConfig",
        "view-regression": "panfm.training.objectives.view_regression.config:ViewRegressionConfig",
    },
)
"""Config classes of the self-supervised objectives (`panfm.config.objective`)."""

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
        "median": "strategies.robust_means:CoordinateMedian",
        "trimmed": "strategies.robust_means:TrimmedMean",
        "geometric-median": "strategies.robust_means:GeometricMedian",
        "l-dawa": "strategies.group_means:LayerwiseMean",
    },
)
"""Means of a group's updates (`strategies.group_means`)."""
