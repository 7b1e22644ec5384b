"""Which parameters of a model a run trains (`train.parts`), and low-rank additions to its weights.

`trained_names` is asked wherever it matters what is trained: gradients, moments, teacher, updates, what travels. The
directors of trained layers count as trained, though experts move them and no gradient does.
"""

from collections.abc import Iterator
from typing import assert_never, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from panfm.config.parts import BlockPartsConfig, LoraConfig, PartsConfig, PlainPartsConfig
from panfm.errors import ConfigError
from panfm.models.backbone import Backbone
from panfm.models.vit import Attention
from panfm.sharing.groups import DIRECTOR

LORA_A, LORA_B = ".lora_a", ".lora_b"


class LoraLinear(nn.Linear):
    """A linear layer with a low-rank addition: (W + B A) x + b."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        """Take over the weight and bias of `linear`."""
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_a = nn.Parameter(torch.zeros(rank, linear.in_features))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Transform x [..., in] to [..., out]."""
        return super().forward(x) + functional.linear(functional.linear(x, self.lora_a), self.lora_b)


def add_lora(backbone: Backbone, parts: PartsConfig) -> None:
    """Give the backbone the low-rank additions that `parts` asks for, if it does.

    Raises:
        ConfigError: `parts` names more blocks than there are, or blocks without attention of ours.
    """
    if isinstance(parts, LoraConfig):
        for attention in _attentions(backbone, parts.blocks):
            attention.qkv = LoraLinear(attention.qkv, parts.rank)
            attention.out = LoraLinear(attention.out, parts.rank)


def is_lora(name: str) -> bool:
    """Whether a parameter is a factor of a low-rank addition."""
    return name.endswith((LORA_A, LORA_B))


def trained_names(model: nn.Module, parts: PartsConfig) -> frozenset[str]:
    """Names of the parameters that a run trains, of a `PanModel`.

    Raises:
        ConfigError: as `add_lora`.
    """
    named = dict(model.named_parameters())
    if parts.kind == "all":
        return frozenset(named)
    if parts.kind == "vectors":
        director = f".{DIRECTOR}."
        return frozenset(name for name, value in named.items() if value.dim() <= 1 and director not in name)
    backbone, heads = cast(Backbone, model.get_submodule("backbone")), model.get_submodule("heads")
    trained = {*heads.parameters(), *_of_backbone(backbone, parts)}
    return frozenset(name for name, value in named.items() if value in trained)


def _of_backbone(backbone: Backbone, parts: PartsConfig) -> Iterator[nn.Parameter]:
    """The trained parameters of a backbone."""
    match parts:
        case PlainPartsConfig(kind="norms"):
            for module in backbone.modules():
                if isinstance(module, nn.LayerNorm):
                    yield from module.parameters()
        case PlainPartsConfig(kind="head"):
            return
        case PlainPartsConfig():
            raise AssertionError(parts.kind)
        case BlockPartsConfig(kind="last-blocks"):
            for module in _last_layers(backbone, parts.blocks):
                yield from module.parameters()
        case BlockPartsConfig():
            for attention in _attentions(backbone, parts.blocks):
                yield from attention.out.parameters()
        case LoraConfig():
            for attention in _attentions(backbone, parts.blocks):
                for layer in (cast(LoraLinear, attention.qkv), cast(LoraLinear, attention.out)):
                    yield layer.lora_b
                    if not parts.frozen_a:
                        yield layer.lora_a
        case _:
            assert_never(parts)


def _attentions(backbone: Backbone, blocks: int) -> list[Attention]:
    """Attention of the last blocks."""
    modules = [inner for module in _last_layers(backbone, blocks) for inner in module.modules()]
    if not (attentions := [module for module in modules if isinstance(module, Attention)]):
        raise ConfigError("train.parts: this backbone has no attention of ours, expected last-blocks, norms or vectors")
    return attentions


def _last_layers(backbone: Backbone, blocks: int) -> list[nn.Module]:
    if blocks > (depth := len(backbone.numbers_per_token())):
        raise ConfigError(f"train.parts.blocks: {blocks}, the model has {depth}")
    return backbone.last_layers(blocks)


def layers_above(model: nn.Module) -> dict[str, int]:
    """Number of trained layers above every parameter's own, for layer-wise decay: 0 for heads and the last norm, 1 for
    the last block, and one more than there are blocks for what comes before the first."""
    backbone, heads = cast(Backbone, model.get_submodule("backbone")), model.get_submodule("heads")
    depth = len(backbone.numbers_per_token())
    known: dict[nn.Parameter, int] = dict.fromkeys(heads.parameters(), 0)
    for above in range(depth + 1):
        for module in backbone.last_layers(above):
            for parameter in module.parameters():
                known.setdefault(parameter, above)
    return {name: known.get(parameter, depth + 1) for name, parameter in model.named_parameters()}
