"""Base of all objectives: targets without a gradient, then a loss per subject, and the heads for it.

A student sees the visible tokens; the objective compares what it predicts about the hidden ones with a target. Targets
come from the teacher (`latent`, `dino`), from the image (`mae`) or from a label table (`supervised`, which hides
nothing). Any masking policy works under any of the others.
All that depends on the data's shape (who hides how much of which stream) is settled in `TokenMask` and the targets;
from there to the loss everything is a plain function of parameters and tensors, so that `panfm.privacy` can go patient
by patient.

To add an objective, write its config class (`panfm.config.objective`) and this class, in a folder or in one file, and a
line in `OBJECTIVES` (`panfm/registry.py`).

Shape legend: B subjects, N patches, K hidden patches, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from panfm.config.objective import ObjectiveConfig
from panfm.data.store import Batch
from panfm.models import PanModel
from panfm.models.backbone import Encoded, Exploration
from panfm.models.heads import ObjectiveHeads
from panfm.models.tokens import gather_tokens
from panfm.registry import import_class
from panfm.training.token_mask import TokenMask

Targets = Mapping[str, Tensor]
"""Tensors that the student has to predict, by name; rows are subjects, or those of them that hold a stream."""


@dataclass(frozen=True)
class StudentOutput:
    """The student's encoding of one masked batch, and its predictions."""

    features: Batch
    """The batch's patch features."""
    mask: TokenMask
    encoded: Encoded
    """The student's encoding of the visible tokens."""
    predictions: Tensor
    """[B, K, D], the predictor's features of the hidden tokens; [B, 0, D] if the objective needs none."""


class Objective(ABC):
    """A loss per subject."""

    needs_teacher: bool = True
    """Whether `targets` reads the teacher's encoding."""
    spreads: bool = False
    """Whether all that couples patients goes through `panfm.models.batch_sums`, so that processes may split a batch."""
    needs_predictions: bool = True
    """Whether `loss` reads predictions of the hidden tokens."""

    @abstractmethod
    def __init__(self, config: Any, model: PanModel, seed: int) -> None:
        """Start with empty statistics.

        Args:
            config: Of the objective's own config class.
            seed: The run's.
        """

    @staticmethod
    def build_heads(config: Any, width: int, num_features: Mapping[str, int]) -> ObjectiveHeads:
        """The heads that the objective adds to a model, given the features of each stream's tokens; none by default."""
        return ObjectiveHeads()

    @abstractmethod
    def targets(self, teacher: PanModel, features: Batch, mask: TokenMask, full: Encoded | None) -> Targets:
        """Compute the targets of a masked batch; `full` is the teacher's encoding of all tokens, with all blocks."""

    @abstractmethod
    def loss(self, student: PanModel, output: StudentOutput, targets: Targets) -> Tensor:
        """Loss of each subject [B]; output and targets have a row for each view, [views x B], first views first."""

    def monitors(self, teacher: PanModel, full: Encoded) -> dict[str, float]:
        """Further monitors (training/monitors.py) of the teacher's encoding of a batch; none by default."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Running statistics, by name, in tensors on the model's device, replaced and never changed in place."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        assert not state, "an objective with statistics restores them"


def build_objective(config: ObjectiveConfig, model: PanModel, *, seed: int) -> Objective:
    """The objective of a description."""
    objective: Objective = import_class(config.implementation)(config, model, seed)
    return objective


def student_output(
    student: PanModel,
    features: Batch,
    mask: TokenMask,
    exploration: Exploration | None = None,
    *,
    predicts: bool = True,
) -> StudentOutput:
    """Encode the visible tokens and predict the hidden ones; the student's routers, if it has any, may explore."""
    tokens = student.tokenize(features, mask.layout)
    keep_blocks = mask.is_whole and student.pooling.reads_blocks
    encoded = student.backbone(
        gather_tokens(tokens, mask.visible_column), mask.visible, exploration=exploration, keep_blocks=keep_blocks
    )
    if not predicts:
        return StudentOutput(features, mask, encoded, encoded.tokens[:, :0])
    predictions = student.heads.predict(encoded, mask.hidden, student.hidden_queries())
    return StudentOutput(features, mask, encoded, predictions)


def mean_over(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of values [B, K] over each subject's valid entries [B]; 0 where there is none."""
    return torch.where(valid, values, torch.zeros_like(values)).sum(dim=1) / valid.sum(dim=1).clamp_min(1)
