"""Adds the low-rank additions (LoRA) of a trained model to the weights that they belong to."""

from collections.abc import Mapping

from torch import Tensor

from panfm.models.trained_parts import LORA_A, LORA_B


def fit_lora(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the low-rank additions of a trained model to its weights, W + B A, where a model of other names has none;
    factors that do not fit a weight stay as they are."""
    fitted = dict(state)
    for name in [name for name in state if name.endswith(LORA_A) and name not in expected]:
        layer = name.removesuffix(LORA_A)
        a, b, weight = state[name], state.get(layer + LORA_B), state.get(f"{layer}.weight")
        if b is not None and weight is not None and _are_factors(a, b, weight):
            fitted[f"{layer}.weight"] = weight + b @ a
            del fitted[name], fitted[layer + LORA_B]
    return fitted


def _are_factors(a: Tensor, b: Tensor, weight: Tensor) -> bool:
    """Whether b @ a has the shape of a weight."""
    is_product = a.dim() == b.dim() == 2 and b.shape[1] == a.shape[0]
    return is_product and (b.shape[0], a.shape[1]) == tuple(weight.shape)
