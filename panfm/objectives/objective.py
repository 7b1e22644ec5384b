"""What every objective looks like to the local loop: a loss per subject.

A student sees the visible places; the objective compares what it guesses about the hidden ones with a target. Targets
come from the teacher (`latent`, `dino`) or from the image (`mae`). Any masking policy works under any objective.

Shape legend: B subjects, N places, K hidden places, D width.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from panfm.data.store import Batch
from panfm.models import PanModel
from panfm.models.backbone import Encoded
from panfm.models.director_experts import Exploration
from panfm.models.tokens import Layout, gather_tokens


@dataclass(frozen=True)
class View:
    """One masked batch, seen by the student."""

    maps: Batch
    """The batch's stem maps."""
    layout: Layout
    """All its places [B, N]."""
    hidden: Layout
    """The hidden ones [B, K]."""
    hidden_column: Tensor
    """int64 [B, K], where in `layout` each hidden place stands."""
    seen: Encoded
    """The student's encoding of the visible places."""
    guesses: Tensor
    """[B, K, D], the predictor's features of the hidden places."""


class Objective(Protocol):
    """A self-supervised loss."""

    needs_teacher: bool
    """Whether `loss` reads the teacher's encoding."""

    def loss(self, student: PanModel, teacher: PanModel, view: View, full: Encoded | None) -> Tensor:
        """Loss of each subject [B]; `full` is the teacher's encoding of all places, block outputs included."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Running statistics, by name; `load_state` takes them back."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        ...


def masked_view(
    student: PanModel, maps: Batch, layout: Layout, hidden: Tensor, exploration: Exploration | None = None
) -> View:
    """Let the student see the visible places and guess the hidden ones (bool [B, N]); its routers, if it has any, may
    explore."""
    tokens = student.tokenize(maps, layout)
    visible, visible_column = layout.select(~hidden)
    hidden_layout, hidden_column = layout.select(hidden)
    seen = student.backbone(gather_tokens(tokens, visible_column), visible, exploration=exploration)
    guesses = student.heads.predict(seen, hidden_layout, student.hidden_queries())
    return View(maps, layout, hidden_layout, hidden_column, seen, guesses)


def mean_over(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of values [B, K] over each subject's valid entries [B]; 0 where there is none."""
    return torch.where(valid, values, torch.zeros_like(values)).sum(dim=1) / valid.sum(dim=1).clamp_min(1)
