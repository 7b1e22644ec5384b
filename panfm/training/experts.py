"""What a Director-Experts backbone adds to a round of local training; to a dense one it adds nothing.

    loss       + alignment-weight / L  sum over the layers l of alignment_l / (L - (l - 1))
               + balance-weight        mean over the layers of balance_l
    after a step: directors, running activations and the round's gate mass move by the batch's gate mass

Noise, momentum and balance weight follow a cosine over the whole run. All that moves moves after a successful step, so
a skipped step leaves no trace. The director moves by the experts that the optimiser has just updated; in the released
code it moves before the optimiser's step, by the experts as they were. The results do not differ measurably
(`models/director_experts.py`).

Source: DEX (arXiv 2605.21861).
"""

import torch
from torch import Tensor
from torch.nn import functional

from panfm.config.model import ExpertsConfig
from panfm.models import PanModel
from panfm.models.backbone import Encoded, Exploration
from panfm.models.director_experts import balance_loss, layer_weight
from panfm.training.schedules import cosine


class ExpertTraining:
    """The experts' share of one round."""

    def __init__(self, config: ExpertsConfig, model: PanModel, generator: torch.Generator) -> None:
        """Start a round.

        Args:
            generator: Draws the routers' noise.
        """
        self.config = config
        self.generator = generator
        self.layers = model.director_experts()
        self._mass = {name: torch.zeros_like(layer.router.activation) for name, layer in self.layers.items()}

    def exploration(self, position: float) -> Exploration | None:
        """The noise of a step at a position of the run."""
        return Exploration.of(_at(self.config.noise, position), self.generator) if self.layers else None

    def regularise(self, loss: Tensor, seen: Encoded, position: float) -> Tensor:
        """Add alignment and balance to an objective's loss; nothing to one that asks for no gradient."""
        if not self.layers or not loss.requires_grad:
            return loss
        alignment = self.alignment(seen).mean()
        balance = torch.stack([balance_loss(routed.probs) for routed in seen.routed]).mean()
        weight = _at(self.config.balance_weight, position)
        return loss + self.config.alignment_weight * alignment + weight * balance

    def alignment(self, seen: Encoded) -> Tensor:
        """Alignment of each subject [B], weighted over the layers."""
        valid = functional.pad(seen.layout.valid, (1, 0), value=True)
        num_layers = len(self.layers)
        losses = [
            layer_weight(number, num_layers) * layer.alignment_loss(routed, valid, self.config.alignment)
            for number, (layer, routed) in enumerate(zip(self.layers.values(), seen.routed, strict=True), start=1)
        ]
        return torch.stack(losses).sum(dim=0) / max(num_layers, 1)

    def absorb(self, seen: Encoded, position: float) -> None:
        """After a successful step: move directors and running activations, count gate mass."""
        momentum = _at(self.config.director_momentum, position)
        for (name, layer), routed in zip(self.layers.items(), seen.routed, strict=True):
            mass = routed.mass()
            layer.move_director(mass, momentum=momentum)
            layer.router.move_activation(mass)
            self._mass[name] += mass

    def gate_mass(self) -> dict[str, list[float]]:
        """Gate mass of every expert over the round's successful steps, by the layer's prefix."""
        return {name: mass.tolist() for name, mass in self._mass.items()}


def _at(ends: tuple[float, float], position: float) -> float:
    return cosine(position, start=ends[0], end=ends[1])
