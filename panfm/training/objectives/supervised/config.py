"""`[objective]` named `supervised`, which a run with `[task]` has."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from panfm.config.objective import ObjectiveConfig


class SupervisedConfig(ObjectiveConfig):
    """Predict the label of `[task]` from the whole of a patient's images."""

    implementation: ClassVar[str | type] = "panfm.training.objectives.supervised.objective:SupervisedObjective"
    name: Literal["supervised"] = "supervised"

    @property
    def hides_tokens(self) -> bool:
        """Whether tokens are hidden from the student: none is."""
        return False

    def couplings(self) -> Iterator[str]:
        """Yield nothing: a patient's loss depends on its own images and label alone."""
        return iter(())
