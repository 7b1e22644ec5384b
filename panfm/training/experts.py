"""Terms and moves that a Director-Experts backbone adds to local training; a dense backbone adds none.

    loss       + alignment-weight / L  sum over the layers l of alignment_l / (L - (l - 1))
               + balance-weight        mean over the layers of balance_l
    after a step: directors and running activations move by the batch's gate mass

Noise, momentum and balance weight follow a cosine over the whole run. Directors and activations move after a successful
step only, so a skipped step leaves no trace. The director moves by the experts that the optimiser has just updated; in
the released code it moves before the optimiser's step, by the experts as they were. The results do not differ
measurably (`models/director_experts.py`).

Source: DEX (arXiv 2605.21861).
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from panfm.config.model import ExpertsConfig
from panfm.models import PanModel
from panfm.models.backbone import Encoded, Exploration
from panfm.models.director_experts import balance_loss, layer_weight
from panfm.training.schedules import cosine


class ExpertTraining:
    """Exploration, regularisers and directors of a model's experts."""

    def __init__(self, config: ExpertsConfig, model: PanModel) -> None:
        self.config = config
        self.model = model
        self.layers = model.director_experts()
        """Layers with experts, by the prefix of their parameters' names."""

    def exploration(self, progress: float, generator: torch.Generator) -> Exploration | None:
        """The routers' noise at a point of the run, drawn from a generator."""
        return Exploration.of(_at(self.config.noise, progress), generator) if self.layers else None

    def regularise(self, loss: Tensor, encoded: Encoded, progress: float) -> Tensor:
        """Add alignment and balance to an objective's loss; nothing to one that asks for no gradient."""
        if not self.layers or not loss.requires_grad:
            return loss
        alignment = self.alignment(encoded).mean()
        return loss + self.config.alignment_weight * alignment + self.balance(encoded, progress)

    def balance(self, encoded: Encoded, progress: float) -> Tensor:
        """Weighted balance of a batch, for a model with experts."""
        balance = torch.stack([balance_loss(routed.probs) for routed in encoded.routed]).mean()
        return _at(self.config.balance_weight, progress) * balance

    def align(self, losses: Tensor, encoded: Encoded) -> Tensor:
        """Add alignment to the loss of each subject [B]: the regulariser that reads one subject alone."""
        if not self.layers:
            return losses
        alignment = self.alignment(encoded).reshape(-1, len(losses)).mean(dim=0)  # over the views of a subject
        return losses + self.config.alignment_weight * alignment

    def alignment(self, encoded: Encoded) -> Tensor:
        """Alignment of each subject [B], weighted over the layers."""
        valid = functional.pad(encoded.layout.valid, (1, 0), value=True)
        layers = self.layers
        losses = [
            layer_weight(number, len(layers)) * layer.alignment_loss(routed, valid, self.config.alignment)
            for number, (layer, routed) in enumerate(zip(layers.values(), encoded.routed, strict=True), start=1)
        ]
        return torch.stack(losses).sum(dim=0) / max(len(layers), 1)

    def gate_mass(self, encoded: Encoded) -> dict[str, Tensor]:
        """Gate mass of every expert in a batch, by layer."""
        return {name: routed.mass() for name, routed in zip(self.layers, encoded.routed, strict=True)}

    @torch.no_grad()
    def after_step(self, gate_mass: Mapping[str, Tensor] | None, progress: float, counts: Tensor) -> None:
        """Move directors and running activations after a step, if it counts.

        Args:
            gate_mass: Of the step's batch; if it is None, directors follow all experts alike and activations stay.
            counts: bool, on the device.
        """
        momentum = _at(self.config.director_momentum, progress)
        for name, layer in self.layers.items():
            if f"{name}.director.0.weight" not in self.model.trained:
                continue
            moved = [*layer.director.parameters(), layer.router.activation]
            before = [value.clone() for value in moved]
            if gate_mass is None:
                layer.move_director(torch.ones_like(layer.router.activation), momentum=momentum)
            else:
                layer.move_director(gate_mass[name], momentum=momentum)
                layer.router.move_activation(gate_mass[name])
            for value, old in zip(moved, before, strict=True):
                value.copy_(torch.where(counts, value, old))


def _at(ends: tuple[float, float], progress: float) -> float:
    return cosine(progress, start=ends[0], end=ends[1])
