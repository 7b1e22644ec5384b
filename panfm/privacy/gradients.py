"""The sum of clipped per-patient gradients: the one number in a private step that touches patients.

    S = sum_j g_j min(1, C / ||g_j||),   g_j the gradient of the loss of patient j alone, ||.|| over all parameters

One patient more or less changes S by at most C. The loss that is differentiated is given one patient and nothing else,
so no term can couple patients through the batch.

Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1.
Shape legend: B patients of a chunk.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

Parameters = Mapping[str, Tensor]
PatientLossFn = Callable[[Parameters, Any], Tensor]
"""Parameters and one patient (a tree of tensors without a batch axis) -> a number."""


def patient_gradients(loss_fn: PatientLossFn, parameters: Parameters, patients: Any) -> dict[str, Tensor]:
    """Gradient of each patient's loss, [B, *shape] per parameter.

    Args:
        patients: tree of tensors whose first axis are the B patients.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # no graph beyond `grad`'s own; fused kernels cannot be batched
        return vmap(grad(loss_fn), in_dims=(None, 0))(dict(parameters), patients)


def clipped_sum(gradients: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
    """Sum over patients of gradients [B, *shape], each scaled to a joint L2 norm of at most `clip_norm`; float64.

    Guarantees:
        bounded: leaving a patient out changes the result by at most clip_norm (1 + 1e-5), in L2 over all parameters.
        poison: a patient with a gradient that is not finite contributes zero.
    """
    norm = torch.stack([_squared_norm(gradient) for gradient in gradients.values()]).sum(dim=0).sqrt()
    factor = (clip_norm / norm.clamp_min(1e-30)).clamp_max(1.0)
    factor = torch.where(norm.isfinite(), factor, 0.0)
    return {name: _weighted(gradient, factor) for name, gradient in gradients.items()}


def _squared_norm(gradient: Tensor) -> Tensor:
    """Squared L2 norm of each row of [B, *shape]: last axis in float32 (a relative 1e-6), the rest in float64."""
    return torch.linalg.vector_norm(gradient, dim=-1).double().square().view(len(gradient), -1).sum(dim=1)


def _weighted(gradient: Tensor, factor: Tensor) -> Tensor:
    flat = gradient.flatten(1)
    if not bool((factor > 0).all()):
        flat = torch.where(factor[:, None] > 0, flat, 0.0)
    return (factor.to(flat.dtype) @ flat).view(gradient.shape[1:]).double()
