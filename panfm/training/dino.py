"""Self-distillation of prototype assignments, for CLS and for hidden tokens.

    teacher  p = softmax((assign(feature) - centre) / teacher-temperature), from all places
    student  q = softmax(assign(guess) / student-temperature), from the visible places
    loss     H(p, q) of CLS + mean over hidden places of H(p, q)

The centre is a running mean of teacher assignments over the batch; it couples subjects, so this objective is not for
private training.

Source: DINO (Caron et al. 2021), iBOT (Zhou et al. 2022).
Shape legend: B subjects, K hidden places, Q prototypes, D width.
"""

import torch
from torch import Tensor

from panfm.config.objectives import DinoConfig
from panfm.data.store import Batch
from panfm.models import PanModel
from panfm.models.backbone import Encoded
from panfm.models.tokens import gather_tokens
from panfm.training.objective import Split, Targets, View, mean_over


class DinoObjective:
    """Cross-entropy to the teacher's centred prototype assignments."""

    needs_teacher = True

    def __init__(self, config: DinoConfig, device: torch.device) -> None:
        self.config = config
        self.centres = {kind: torch.zeros(config.prototypes, device=device) for kind in ("cls", "token")}

    @torch.no_grad()
    def targets(self, teacher: PanModel, maps: Batch, split: Split, full: Encoded | None) -> Targets:
        """Centred assignments of CLS [B, Q] and of the hidden places [B, K, Q]. Moves the centres."""
        assert full is not None
        cls = self._assign(teacher, full.cls, "cls", full.layout.valid.any(dim=1))
        hidden = gather_tokens(full.tokens, split.hidden_column)
        return {"cls": cls, "places": self._assign(teacher, hidden, "token", split.hidden.valid)}

    def loss(self, student: PanModel, view: View, targets: Targets) -> Tensor:
        """Loss of each subject [B]."""
        cls = self._cross_entropy(student, student.heads.project(view.seen.cls), targets["cls"])
        places = self._cross_entropy(student, view.guesses, targets["places"])
        return cls + mean_over(places, view.split.hidden.valid)

    def _assign(self, teacher: PanModel, features: Tensor, kind: str, valid: Tensor) -> Tensor:
        scores = teacher.heads.assign(teacher.heads.project(features)).float()
        target = ((scores - self.centres[kind]) / self.config.teacher_temperature).softmax(dim=-1)
        if bool(valid.any()):
            self.centres[kind] = self.centres[kind].lerp(scores[valid].mean(dim=0), 1.0 - self.config.centre_momentum)
        return target

    def _cross_entropy(self, student: PanModel, features: Tensor, target: Tensor) -> Tensor:
        scores = student.heads.assign(features).float() / self.config.student_temperature
        return -(target * scores.log_softmax(dim=-1)).sum(dim=-1)

    def state(self) -> dict[str, Tensor]:
        """The centres, by name."""
        return {f"centre.{kind}": centre for kind, centre in self.centres.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.centres = {
            kind: state[f"centre.{kind}"].to(centre.device, copy=True) for kind, centre in self.centres.items()
        }
