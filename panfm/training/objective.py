"""What every objective looks like to the local loop: targets without a gradient, then a loss per subject.

A student sees the visible places; the objective compares what it guesses about the hidden ones with a target. Targets
come from the teacher (`latent`, `dino`) or from the image (`mae`). Any masking policy works under any objective.
What depends on the data's shape (who hides how much of what) is settled in `Split` and the targets; from there to the
loss everything is a plain function of parameters and tensors, so that `panfm.privacy` can take it patient by patient.

Shape legend: B subjects, N places, K hidden places, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from panfm.data.store import Batch
from panfm.models import PanModel
from panfm.models.backbone import Encoded, Exploration
from panfm.models.tokens import Layout, gather_tokens

Targets = Mapping[str, Tensor]
"""What the student has to guess, by name; rows are subjects, or those of them that hold a stream."""


@dataclass(frozen=True)
class Split:
    """Which places of a batch the student sees, and which it guesses."""

    layout: Layout
    """All places [B, N]."""
    visible: Layout
    """Those it sees [B, V]."""
    visible_column: Tensor
    """int64 [B, V], where in `layout` each visible place stands."""
    hidden: Layout
    """Those it guesses [B, K]."""
    hidden_column: Tensor
    """int64 [B, K], where in `layout` each hidden place stands."""

    @classmethod
    def of(cls, layout: Layout, hidden: Tensor) -> Self:
        """Hide some places (bool [B, N])."""
        return cls(layout, *layout.select(~hidden), *layout.select(hidden))


@dataclass(frozen=True)
class View:
    """One masked batch, seen by the student."""

    maps: Batch
    """The batch's stem maps."""
    split: Split
    seen: Encoded
    """The student's encoding of the visible places."""
    guesses: Tensor
    """[B, K, D], the predictor's features of the hidden places."""


class Objective(Protocol):
    """A self-supervised loss."""

    needs_teacher: bool
    """Whether `targets` reads the teacher's encoding."""

    def targets(self, teacher: PanModel, maps: Batch, split: Split, full: Encoded | None) -> Targets:
        """What is to be guessed; `full` is the teacher's encoding of all places, block outputs included."""
        ...

    def loss(self, student: PanModel, view: View, targets: Targets) -> Tensor:
        """Loss of each subject [B]."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Running statistics, by name; `load_state` takes them back."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        ...


def masked_view(student: PanModel, maps: Batch, split: Split, exploration: Exploration | None = None) -> View:
    """Let the student see the visible places and guess the hidden ones; its routers, if it has any, may explore."""
    tokens = student.tokenize(maps, split.layout)
    seen = student.backbone(gather_tokens(tokens, split.visible_column), split.visible, exploration=exploration)
    guesses = student.heads.predict(seen, split.hidden, student.hidden_queries())
    return View(maps, split, seen, guesses)


def mean_over(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of values [B, K] over each subject's valid entries [B]; 0 where there is none."""
    return torch.where(valid, values, torch.zeros_like(values)).sum(dim=1) / valid.sum(dim=1).clamp_min(1)
