"""`[objective]` named `views`."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from panfm.config.base import Weight
from panfm.config.objective import ObjectiveConfig


class ViewsConfig(ObjectiveConfig):
    """Make two augmented, masked views of a patient alike, and the features of a batch unlike (VICReg).

    A batch shows one stream; the streams of a site take turns."""

    implementation: ClassVar[str | type] = "panfm.training.objectives.views.objective:ViewsObjective"
    name: Literal["views"] = "views"
    invariance_weight: Weight = 25.0
    """Weight in the loss of the squared difference between the two views."""
    variance_weight: Weight = 25.0
    """Weight in the loss of the term that pulls every feature's deviation over the batch up to 1."""
    covariance_weight: Weight = 1.0
    """Weight in the loss of the squared covariances between features."""
    hidden_width: Annotated[int, Field(gt=0, le=65_536)] = 256
    """Of the projector."""
    projected_width: Annotated[int, Field(gt=1, le=65_536)] = 128
    """Features of a projection."""
    pairs: bool = False
    """Pairs of streams take turns too: the two views of a patient then show two of its streams."""

    @property
    def num_views(self) -> int:
        """Two views of each patient."""
        return 2

    @property
    def streams_per_batch(self) -> Literal["all", "one", "one-or-pair"]:
        """One stream, or two where `pairs` says so."""
        return "one-or-pair" if self.pairs else "one"

    def couplings(self) -> Iterator[str]:
        """Yield what couples patients, as `key: why, remedy`, one line each."""
        yield 'name: "views" compares the patients of a batch, set "view-regression", "latent" or "mae"'
