"""Two details of the authors' Director-Experts code in which ours differs: the start, and the order of a step.

    ActivationFromZero   running activation c starts at 0, so that c / sum c is the first batch's share after one step
    DirectorFirst        director moves by the experts as they were before the optimiser's step
    Released             both

Parameters and everything else are those of `DirectorExperts`. `docs/results/director-experts.md` has the measurement.
"""

from copy import deepcopy

import torch
from torch import Tensor

from panfm.models import PanModel
from panfm.models.director_experts import DirectorExperts, Experts, Exploration, Routed


class ActivationFromZero(DirectorExperts):
    """The running activation starts at 0. Before the first batch c / sum c is 0 / 0: no expert is favoured then."""

    def reset_activation(self) -> None:
        """No expert was active."""
        self.activation.zero_()

    def _logits(self, cls: Tensor, exploration: Exploration | None) -> Tensor:
        if exploration is None or self.activation.any():
            return super()._logits(cls, exploration)
        logits = super()._logits(cls, None)
        return logits + exploration.scale * exploration.draw(logits)


class DirectorFirst(DirectorExperts):
    """The director moves before the optimiser's step: by the experts of the last forward pass for training."""

    experts_of_step: tuple[Experts]
    """Their copy, in a tuple so that it is no part of the model's state."""

    def forward(self, x: Tensor, exploration: Exploration | None = None) -> Routed:
        """Route x [B, L, D]; under exploration, that is in training, keep a copy of the experts."""
        if exploration is not None:
            self.experts_of_step = (deepcopy(self.experts),)
        return super().forward(x, exploration)

    @torch.no_grad()
    def move_director(self, mass: Tensor, *, momentum: float) -> None:
        """Group EMA over the kept experts."""
        updated, (self.experts,) = self.experts, self.experts_of_step
        super().move_director(mass, momentum=momentum)
        self.experts = updated


class Released(ActivationFromZero, DirectorFirst):
    """Both."""


def use_layers(model: PanModel, kind: type[DirectorExperts]) -> None:
    """Make a model's layers with experts ones of a kind, before its first step; parameters stay where they are."""
    for layer in model.director_experts().values():
        layer.__class__ = kind
        layer.reset_activation()
