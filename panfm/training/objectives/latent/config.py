"""`[objective]` named `latent`."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from panfm.config.base import Fraction, Weight
from panfm.config.objective import ObjectiveConfig


class LatentConfig(ObjectiveConfig):
    """Regress the teacher's features of the hidden tokens (data2vec-style, per patient)."""

    implementation: ClassVar[str | type] = "panfm.training.objectives.latent.objective:LatentObjective"
    name: Literal["latent"] = "latent"
    top_blocks: Annotated[int, Field(gt=0, le=64)] = 2
    """Targets are the mean of the normalised outputs of this many last teacher blocks."""
    beta: Annotated[float, Field(ge=1e-3, le=1e3)] = 0.5
    """Smooth-L1 corner."""
    summary_weight: Weight = 1.0
    """Weight of the CLS loss: from CLS and an organ query, predict the teacher's summary of each organ present."""
    content_share: Fraction = 0.5
    """Share of the target's variance that is a fixed random projection of the token's own content; the rest is the
    teacher's. Keeps the teacher from drifting to what is easy to predict."""
    standardise: bool = True
    """Standardise targets per (stream, token, feature) by running statistics; turn off under privacy."""

    def couplings(self) -> Iterator[str]:
        """Yield what couples patients, as `key: why, remedy`, one line each."""
        if self.standardise:
            yield "standardise: running statistics couple patients, set false"

    def without_running_statistics(self) -> Self:
        """The same objective with targets that are not standardised."""
        return self.model_copy(update={"standardise": False})

    def num_running_values(self, width: int, num_tokens: int, num_streams: int) -> int:
        """Count, mean and mean square of each token's features and content, and of each stream's summary."""
        return (2 * num_tokens + num_streams) * (2 * width + 1)
