"""`[objective]`: the self-supervised loss, one table per name."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from panfm.config.base import Config, Fraction, Temperature, Uncoupled, Weight


class LatentConfig(Config):
    """Regress the teacher's features of what was hidden (data2vec-style, per patient)."""

    name: Literal["latent"] = "latent"
    top_blocks: Annotated[int, Field(gt=0, le=64)] = 2
    """Targets are the mean of the normalised outputs of this many last teacher blocks."""
    beta: Annotated[float, Field(ge=1e-3, le=1e3)] = 0.5
    """Smooth-L1 corner."""
    summary_weight: Weight = 1.0
    """Weight of the CLS loss: from CLS and an organ query, guess the teacher's summary of each organ present."""
    content_share: Fraction = 0.5
    """Share of the target's variance that is a fixed random projection of the token's own content; the rest is the
    teacher's. Keeps the teacher from drifting to what is easy to guess."""
    standardise: bool = True
    """Standardise targets per (stream, token, feature) by running statistics; turn off under privacy."""

    def couplings(self) -> Iterator[str]:
        """What couples patients, as `key: why, remedy`, one line each."""
        if self.standardise:
            yield "standardise: running statistics couple patients, set false"


class DinoConfig(Config):
    """Self-distillation of prototype assignments of CLS and hidden tokens (DINO/iBOT-style)."""

    name: Literal["dino"]
    prototypes: Annotated[int, Field(gt=0, le=65_536)] = 256
    student_temperature: Temperature = 0.1
    teacher_temperature: Temperature = 0.04
    centre_momentum: Fraction = 0.9

    def couplings(self) -> Iterator[str]:
        """What couples patients, as `key: why, remedy`, one line each."""
        yield 'name: "dino" centres its targets over the batch, set "latent" or "mae"'


class MaeConfig(Uncoupled):
    """Reconstruct the normalised voxels of hidden patches."""

    name: Literal["mae"]


def _latent_unless_named(table: Any) -> Any:
    return {"name": "latent"} | table if isinstance(table, dict) else table


ObjectiveConfig = Annotated[
    LatentConfig | DinoConfig | MaeConfig, Field(discriminator="name"), BeforeValidator(_latent_unless_named)
]
