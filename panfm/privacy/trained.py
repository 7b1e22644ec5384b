"""Which parameters a private run trains. The others stay as the run started them, for instance pre-trained on public
data: the fewer are trained, the less noise there is in all."""

from typing import Literal

from torch import nn

from panfm.models import PanModel


def trained_parameters(model: PanModel, which: Literal["all", "vectors", "last-block"]) -> dict[str, nn.Parameter]:
    """The trained parameters, by name, in the model's order."""
    last = f"backbone.blocks.{len(model.backbone.blocks) - 1}."
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if which == "vectors":
        return {name: parameter for name, parameter in found.items() if parameter.dim() <= 1}
    if which == "last-block":
        top = (last, "backbone.norm.", "heads.")
        return {name: parameter for name, parameter in found.items() if name.startswith(top)}
    return found
