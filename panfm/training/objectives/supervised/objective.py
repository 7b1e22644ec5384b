"""Supervised loss: the head of the run's task predicts each patient's label from its embedding.

    yes-no   binary cross-entropy of one logit
    classes  cross-entropy
    number   squared error of (label - centre) / scale

Embeddings are pooled as `[features]` says. A patient whose label is not known has loss 0.

Shape legend: B subjects, K outputs of the task.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from panfm.config.task import TaskConfig
from panfm.data.store import Batch
from panfm.errors import ConfigError
from panfm.models import PanModel
from panfm.models.backbone import Encoded
from panfm.training.objectives.interface import Objective, StudentOutput, Targets
from panfm.training.objectives.supervised.config import SupervisedConfig
from panfm.training.token_mask import TokenMask


class SupervisedObjective(Objective):
    """Loss of the task's labels, per subject; keeps no state and needs no teacher."""

    needs_teacher = False
    needs_predictions = False

    def __init__(self, config: SupervisedConfig, model: PanModel, seed: int) -> None:
        """Take the task that the model has a head for. Raises ConfigError: it has none."""
        if model.task is None:
            raise ConfigError("objective.name: this model has no head of a task, expected a table [task]")
        self.task: TaskConfig = model.task

    def targets(self, teacher: PanModel, features: Batch, mask: TokenMask, full: Encoded | None) -> Targets:
        """The labels of the batch [B, K]; NaN where unknown."""
        assert features.labels is not None, "a run with [task] trains on a store that has its labels"
        return {"labels": features.labels}

    def loss(self, student: PanModel, output: StudentOutput, targets: Targets) -> Tensor:
        """Loss of each subject [B]."""
        head = cast(nn.Linear, student.heads.task)
        return label_losses(self.task, head(student.pool(output.encoded)).float(), targets["labels"])


def label_losses(task: TaskConfig, outputs: Tensor, labels: Tensor) -> Tensor:
    """Loss of each subject [B], from the outputs [B, K] of a task's head and labels [B, K], NaN where unknown."""
    is_known = torch.isfinite(labels).all(dim=1)
    known = labels.masked_fill(~is_known[:, None], 0.0)
    if task.kind == "classes":
        losses = functional.cross_entropy(outputs, known, reduction="none")
    elif task.kind == "yes-no":
        losses = functional.binary_cross_entropy_with_logits(outputs, known, reduction="none").mean(dim=1)
    else:
        assert task.kind == "number"
        losses = functional.mse_loss(outputs, known, reduction="none").mean(dim=1)
    return losses.masked_fill(~is_known, 0.0)
