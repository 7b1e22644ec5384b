"""Which parameters a private run trains. The others stay as the run started them, for instance pre-trained on public
data: the fewer are trained, the less noise there is in all."""

from typing import Literal, assert_never

from torch import nn

from panfm.models import PanModel


def trained_parameters(model: PanModel, which: Literal["all", "vectors", "last-block"]) -> dict[str, nn.Parameter]:
    """Parameters that the run trains, by name, in the model's order."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    match which:
        case "all":
            return trained
        case "vectors":
            return {name: parameter for name, parameter in trained.items() if parameter.dim() <= 1}
        case "last-block":
            modules = (*model.backbone.last_layers(1), model.heads)
            last = {parameter for module in modules for parameter in module.parameters()}
            return {name: parameter for name, parameter in trained.items() if parameter in last}
        case _:
            assert_never(which)
