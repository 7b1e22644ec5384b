"""From one view, masked, the student predicts the teacher's features of the other view, whole; and the other way round.

    target  LayerNorm of the teacher's CLS, and LayerNorm of the mean of its tokens
    loss    mean over the two views of mean SmoothL1(predictor(student's CLS and mean) - target of the other view)

No patient's loss depends on another: the private sibling of `views`. Nothing but the teacher's slowness, or its being
frozen, keeps features from collapsing.

Source: BYOL (Grill et al. 2020), with layer norm in place of batch norm.
Shape legend: B subjects, D width.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from panfm.data.store import Batch
from panfm.models import PanModel
from panfm.models.backbone import Encoded
from panfm.models.heads import ObjectiveHeads
from panfm.models.pooling import cls_and_mean
from panfm.training.objectives.interface import Objective, StudentOutput, Targets
from panfm.training.objectives.view_regression.config import ViewRegressionConfig
from panfm.training.token_mask import TokenMask


class ViewRegressionObjective(Objective):
    """Regression of the teacher's features across views, per subject; keeps no state."""

    needs_predictions = False

    def __init__(self, config: ViewRegressionConfig, model: PanModel, seed: int) -> None:
        self.config = config

    @staticmethod
    def build_heads(config: ViewRegressionConfig, width: int, num_features: Mapping[str, int]) -> ObjectiveHeads:
        """Make the predictor."""
        hidden = config.hidden_width
        layers = nn.Linear(2 * width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, 2 * width)
        return ObjectiveHeads({"view_predictor": nn.Sequential(*layers)})

    @torch.no_grad()
    def targets(self, teacher: PanModel, features: Batch, mask: TokenMask, full: Encoded | None) -> Targets:
        """The teacher's features of the other view of each row, [2 B, 2 D]."""
        assert full is not None
        taught = cls_and_mean(full).float().unflatten(1, (2, -1))
        normed = functional.layer_norm(taught, taught.shape[-1:]).flatten(1)
        return {"other": normed.roll(len(normed) // 2, dims=0)}

    def loss(self, student: PanModel, output: StudentOutput, targets: Targets) -> Tensor:
        """Loss of each subject [B]."""
        predictor = cast(nn.Sequential, student.heads.view_predictor)
        predicted: Tensor = predictor(cls_and_mean(output.encoded))
        distance = functional.smooth_l1_loss(
            predicted.float(), targets["other"], beta=self.config.beta, reduction="none"
        )
        return distance.mean(dim=1).unflatten(0, (2, -1)).mean(dim=0)
