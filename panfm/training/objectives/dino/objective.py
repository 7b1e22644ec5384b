"""Self-distillation of prototype assignments, for CLS and for hidden tokens.

    teacher  p = softmax((assign(feature) - centre) / teacher-temperature), from all patches
    student  q = softmax(assign(prediction) / student-temperature), from the visible patches
    loss     H(p, q) of CLS + mean over hidden patches of H(p, q)

With two views of a patient, p of CLS comes from the other view than q (DINO, equation 3), p of a hidden patch from the
same view (iBOT, equations 1 and 2), and the loss is the mean over the views.

The centre is a running mean of teacher assignments over the batch; it couples subjects, so this objective is not for
private training.

Source: DINO (Caron et al. 2021), iBOT (Zhou et al. 2022).
Shape legend: B subjects, V views of each, K hidden patches, Q prototypes, D width.
"""

import math
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from panfm.data.store import Batch, send
from panfm.models import PanModel, batch_sums
from panfm.models.backbone import Encoded
from panfm.models.heads import ObjectiveHeads
from panfm.models.tokens import gather_tokens
from panfm.training.objectives.dino.config import DinoConfig
from panfm.training.objectives.interface import Objective, StudentOutput, Targets, mean_over
from panfm.training.token_mask import TokenMask


class DinoObjective(Objective):
    """Cross-entropy to the teacher's centred prototype assignments."""

    spreads = True

    def __init__(self, config: DinoConfig, model: PanModel, seed: int) -> None:
        self.config = config
        device = model.stream_of_patch.device
        self.centres = {kind: torch.zeros(config.prototypes, device=device) for kind in ("cls", "token")}

    @staticmethod
    def build_heads(config: DinoConfig, width: int, num_features: Mapping[str, int]) -> ObjectiveHeads:
        """Make the prototypes."""
        return ObjectiveHeads({"prototypes": nn.Linear(width, config.prototypes, bias=False)})

    @torch.no_grad()
    def targets(self, teacher: PanModel, features: Batch, mask: TokenMask, full: Encoded | None) -> Targets:
        """Centred assignments of CLS of the other view [V B, Q], if there is one, and of the hidden patches
        [V B, K, Q]. Moves the centres."""
        assert full is not None
        cls = self._assign(teacher, full.cls, "cls", full.layout.lengths() > 0)
        hidden = gather_tokens(full.tokens, mask.hidden_column)
        other = cls.roll(len(cls) // self.config.views, dims=0)
        valid = np.arange(hidden.shape[1]) < mask.hidden.lengths()[:, None]
        return {"cls": other, "patches": self._assign(teacher, hidden, "token", valid)}

    def loss(self, student: PanModel, output: StudentOutput, targets: Targets) -> Tensor:
        """Loss of each subject [B]."""
        cls = self._cross_entropy(student, student.heads.project(output.encoded.cls), targets["cls"])
        tokens = self._cross_entropy(student, output.predictions, targets["patches"])
        of_views: Tensor = cls + mean_over(tokens, output.mask.hidden.valid)
        return of_views.unflatten(0, (self.config.views, -1)).mean(dim=0)

    def monitors(self, teacher: PanModel, full: Encoded) -> dict[str, float]:
        """Mean entropy of p of CLS over the subjects, as a share of its maximum; the centre stays."""
        scores = assign(teacher, teacher.heads.project(full.cls)).float() - self.centres["cls"]
        p = (scores / self.config.teacher_temperature).softmax(dim=-1)
        entropy = torch.special.entr(p).sum(dim=-1).mean() / math.log(p.shape[-1])
        return {"teacher-entropy": float(entropy)} if torch.isfinite(entropy) else {}

    def _assign(self, teacher: PanModel, features: Tensor, kind: str, valid: NDArray[np.bool_]) -> Tensor:
        scores = assign(teacher, teacher.heads.project(features)).float()
        target = ((scores - self.centres[kind]) / self.config.teacher_temperature).softmax(dim=-1)
        if valid.any() or batch_sums.add_processes:
            known = scores.flatten(0, -2)[send(torch.from_numpy(np.flatnonzero(valid)), scores.device)]
            mean = batch_sums.batch_mean(known, self.centres[kind])
            self.centres[kind] = self.centres[kind].lerp(mean, 1.0 - self.config.centre_momentum)
        return target

    def _cross_entropy(self, student: PanModel, features: Tensor, target: Tensor) -> Tensor:
        scores = assign(student, features).float() / self.config.student_temperature
        return -(target * scores.log_softmax(dim=-1)).sum(dim=-1)

    def state(self) -> dict[str, Tensor]:
        """The centres, by name."""
        return {f"centre.{kind}": centre for kind, centre in self.centres.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.centres = {
            kind: state[f"centre.{kind}"].to(centre.device, copy=True) for kind, centre in self.centres.items()
        }


def assign(model: PanModel, features: Tensor) -> Tensor:
    """Cosine similarity of features [..., D] to the model's prototypes -> [..., Q]."""
    weight = functional.normalize(cast(nn.Linear, model.heads.prototypes).weight, dim=-1)
    return functional.linear(functional.normalize(features, dim=-1), weight)
