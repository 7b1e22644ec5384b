"""Two details of the authors' Director-Experts code in which ours differs: the start, and the order of a step.

    ActivationFromZero   running activation c starts at 0, so that c / sum c is the first batch's share after one step
    DirectorFirst        director moves by the experts as they were before the optimiser's step
    Released             both

Parameters and everything else are those of `DirectorExpertsBackbone`. `docs/results/director-experts.md` has the
measurement.
"""

from copy import deepcopy

import torch
from torch import Tensor

from panfm.models.backbone import Exploration, Routed
from panfm.models.director_experts import DirectorExperts, DirectorExpertsBackbone, Router
from panfm.models.dispatch import Experts
from panfm.registry import BACKBONES


class RouterFromZero(Router):
    """Router whose running activation starts at 0. Before the first batch c / sum c is 0 / 0: no expert is favoured."""

    def reset_activation(self) -> None:
        """Set all experts inactive."""
        self.activation.zero_()

    def rarity(self) -> Tensor:
        """How seldom each expert was active [R]; 0 before the first batch."""
        return super().rarity() if self.activation.any() else torch.zeros_like(self.activation)


class EarlyDirectorExperts(DirectorExperts):
    """Layer whose director moves by the experts of the last forward pass for training."""

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


class ActivationFromZero(DirectorExpertsBackbone):
    """Director-Experts with the released code's start."""

    router_class = RouterFromZero


class DirectorFirst(DirectorExpertsBackbone):
    """Director-Experts with the released code's order of a step."""

    layer_class = EarlyDirectorExperts


class Released(ActivationFromZero, DirectorFirst):
    """Director-Experts with both."""


BACKBONES.register("dex-activation-zero", ActivationFromZero)
BACKBONES.register("dex-director-first", DirectorFirst)
BACKBONES.register("dex-released", Released)
