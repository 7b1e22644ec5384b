"""Predict the direction of the teacher's features of the hidden tokens.

    loss = mean over hidden tokens of 1 - cos(prediction, teacher's token after the last norm)

Shape legend: B subjects, K hidden tokens, D width.
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from panfm.config.objective import ObjectiveConfig
from panfm.data.store import Batch
from panfm.models import PanModel
from panfm.models.backbone import Encoded
from panfm.models.tokens import gather_tokens
from panfm.training.objectives.interface import Objective, StudentOutput, Targets, mean_over
from panfm.training.token_mask import TokenMask


class CosineObjective(Objective):
    """Cosine distance to the teacher's tokens; keeps no statistics."""

    def __init__(self, config: "CosineConfig", model: PanModel, seed: int) -> None:
        """Keep the options."""
        self.config = config

    @torch.no_grad()
    def targets(self, teacher: PanModel, features: Batch, mask: TokenMask, full: Encoded | None) -> Targets:
        """The teacher's hidden tokens [B, K, D]."""
        assert full is not None
        return {"tokens": gather_tokens(full.tokens.float(), mask.hidden_column)}

    def loss(self, student: PanModel, output: StudentOutput, targets: Targets) -> Tensor:
        """Loss of each subject [B]."""
        distance = 1.0 - functional.cosine_similarity(output.predictions.float(), targets["tokens"], dim=-1)
        return mean_over(distance**self.config.power, output.mask.hidden.valid)


class CosineConfig(ObjectiveConfig):
    """`[objective]` named `cosine`."""

    implementation: ClassVar[str | type[Any]] = CosineObjective
    name: Literal["cosine"] = "cosine"
    power: Annotated[int, Field(ge=1, le=4)] = 1
    """Power of the distance; above 1, tokens that are far off count more."""

    def couplings(self) -> Iterator[str]:
        """Yield nothing: a patient's loss depends on no other patient. Without this method private runs refuse it."""
        return iter(())
