"""`[objective]` named `view-regression`."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from panfm.config.objective import ObjectiveConfig


class ViewRegressionConfig(ObjectiveConfig):
    """From a masked view of a patient, predict the teacher's features of another view of the same patient.

    The teacher follows the student by `train.teacher-momentum`; `[1, 1]` keeps it at the run's start, which is safer
    where it is a trained model."""

    implementation: ClassVar[str | type] = "panfm.training.objectives.view_regression.objective:ViewRegressionObjective"
    name: Literal["view-regression"] = "view-regression"
    hidden_width: Annotated[int, Field(gt=0, le=65_536)] = 256
    """Of the predictor."""
    beta: Annotated[float, Field(ge=1e-3, le=1e3)] = 0.5
    """Smooth-L1 corner."""

    @property
    def num_views(self) -> int:
        """Two views of each patient."""
        return 2

    def couplings(self) -> Iterator[str]:
        """Yield nothing: a patient is compared with itself alone."""
        return iter(())
