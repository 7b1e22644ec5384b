"""`[objective]` named `dino`."""

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from panfm.config.base import Fraction, Temperature
from panfm.config.objective import ObjectiveConfig


class DinoConfig(ObjectiveConfig):
    """Self-distillation of prototype assignments of CLS and hidden tokens (DINO/iBOT-style)."""

    implementation: ClassVar[str | type] = "panfm.training.objectives.dino.objective:DinoObjective"
    name: Literal["dino"] = "dino"
    views: Literal[1, 2] = 1
    """Views of each patient in a step. 1: the student's CLS is compared with the teacher's of the same images. 2: with
    the teacher's of another augmented view; hidden tokens are still compared within their view."""
    prototypes: Annotated[int, Field(gt=0, le=65_536)] = 256
    """Number of prototypes: learned vectors that the head compares features with."""
    student_temperature: Temperature = 0.1
    """Temperature of the softmax over the student's prototype scores."""
    teacher_temperature: Temperature = 0.04
    """Temperature of the softmax over the teacher's prototype scores."""
    centre_momentum: Fraction = 0.9
    """EMA momentum of the mean scores that are subtracted from the teacher's scores."""

    @property
    def num_views(self) -> int:
        """Views of each patient in a step."""
        return self.views

    def couplings(self) -> Iterator[str]:
        """Yield what couples patients, as `key: why, remedy`, one line each."""
        yield 'name: "dino" centres its targets over the batch, set "latent" or "mae"'

    def num_target_values(self, num_features: Sequence[int]) -> int:
        """Count the scores and assignments of the teacher, and the scores of the student."""
        return 3 * self.prototypes

    def num_running_values(self, width: int, num_tokens: int, num_streams: int) -> int:
        """Count the numbers of the centres of CLS and of tokens."""
        return 2 * self.prototypes
