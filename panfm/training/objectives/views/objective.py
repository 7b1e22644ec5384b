"""Two views of a patient are projected alike; over the patients of a batch, features vary and are not correlated.

    z      projection of CLS and mean of the visible tokens of a view: D -> 256 -> LayerNorm -> GELU -> 128
    loss   25 mean (z_1 - z_2)^2                                                        per patient
           + 25 mean over both views and features of max(0, 1 - sqrt(variance + 1e-4))  of the batch
           + 1  sum over both views of the squared covariances of two features, over the number of features

Weights can be set. The terms of the batch couple patients, so this objective is not for private training.

Source: VICReg (Bardes et al. 2022), with the factors of the authors' code; there the projector has batch norms.
Shape legend: B subjects, F projected features, D width.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from panfm.data.store import Batch
from panfm.models import PanModel
from panfm.models.backbone import Encoded
from panfm.models.heads import ObjectiveHeads
from panfm.models.pooling import cls_and_mean
from panfm.training.objectives.interface import Objective, StudentOutput, Targets
from panfm.training.objectives.views.config import ViewsConfig
from panfm.training.token_mask import TokenMask

_VARIANCE_FLOOR = 1e-4


class ViewsObjective(Objective):
    """VICReg of two views; keeps no state and needs no teacher."""

    needs_teacher = False
    needs_predictions = False

    def __init__(self, config: ViewsConfig, model: PanModel, seed: int) -> None:
        self.config = config

    @staticmethod
    def build_heads(config: ViewsConfig, width: int, num_features: Mapping[str, int]) -> ObjectiveHeads:
        """Make the projector."""
        hidden = config.hidden_width
        layers = (
            nn.Linear(2 * width, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, config.projected_width),
        )
        return ObjectiveHeads({"projector": nn.Sequential(*layers)})

    def targets(self, teacher: PanModel, features: Batch, mask: TokenMask, full: Encoded | None) -> Targets:
        """Return no targets: the views are compared with each other."""
        return {}

    def loss(self, student: PanModel, output: StudentOutput, targets: Targets) -> Tensor:
        """Loss of each subject [B]; the terms of the batch are in all of them alike."""
        projector = cast(nn.Sequential, student.heads.projector)
        projected: Tensor = projector(cls_and_mean(output.encoded))
        first, second = projected.float().unflatten(0, (2, -1))
        config = self.config
        invariance = (first - second).square().mean(dim=1)
        variance = (low_deviation(first) + low_deviation(second)) / 2
        covariance = correlation(first) + correlation(second)
        of_batch = config.variance_weight * variance + config.covariance_weight * covariance
        return config.invariance_weight * invariance + of_batch


def low_deviation(projected: Tensor) -> Tensor:
    """How far the standard deviations of features [B, F] over the batch lie below 1, on average; 1 for one subject."""
    variance = (projected - projected.mean(dim=0)).square().sum(dim=0) / max(len(projected) - 1, 1)
    return torch.relu(1.0 - (variance + _VARIANCE_FLOOR).sqrt()).mean()


def correlation(projected: Tensor) -> Tensor:
    """Sum of the squared covariances of different features [B, F] over the batch, over the number of features."""
    centred = projected - projected.mean(dim=0)
    covariance = centred.T @ centred / max(len(projected) - 1, 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / projected.shape[1]
