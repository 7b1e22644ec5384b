"""Sums over patients to which no patient adds more than a known norm; all that a private round computes of patients.

    S = sum_j g_j min(1, C / ||g_j||),   g_j the gradient of the loss of patient j alone, ||.|| over all parameters

One patient more or less changes S by at most C, whatever parameters and loss the server chose. Two things make it so.

Norm, factor and sum are float64. Gradients are float32, from 1e-45 to 3e38: their squares are float64s, so no gradient
is too small or too large to be measured.

A gradient is computed from one patient's own tensors, one patient at a time. In a batch of several, even of a fixed
shape, a patient's last bits depend on its place among the others (measured: with 15 tokens a patient, its gradient
moves by 1e-8 to 4e-4 of its norm when the batch is permuted), and a server can choose parameters in which the last bit
decides between gradients that have nothing in common: routers that read rounding errors moved the sum by 1.9 C when
batches were of different sizes (`tests/attacks/test_private_step.py`). `simulations/bench/dp_step.py` tells the cost.

What is not proved: that a library computes the same bits from the same numbers twice. Tensors are aligned alike and the
number of threads is fixed, which is what MKL asks for.

The saliency profile of a site is released once a round, from a noised sum over all its patients:

    V = sum_j (a_j, e_j) + N(0, (z sqrt 2)^2)

with a_j the shares of patient j over the streams, and e_j an equal split over those that j has. Both are non-negative
and sum to 1. The profile is V's first half over its second: what streams get relative to an equal split, both with one
standard deviation of the noise added, so that it tends to 1 where the noise leaves nothing to tell. A share is at most
1 and an equal split at least 1/S, so a profile without noise lies in [0, S]; a noised one is cut to that.

Shape legend: S streams.
Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panfm.data.store import Batch, ImageStore
from panfm.privacy.mechanisms import SALIENCY_SENSITIVITY
from panfm.privacy.randomness import with_noise
from panfm.training.trainer import Trainer


def one_patient(store: ImageStore, index: int, device: torch.device, generator: torch.Generator | None = None) -> Batch:
    """A batch of one subject, in memory that torch allocated: kernels may round by how their input is aligned.

    Shapes follow from the streams that the patient holds; nobody else's data, number or order decides a path through
    the code.

    Args:
        generator: The patient's own, which draws one of several sessions; the first is shown when left out.
    """

    def pick(_: int, count: int) -> int:
        return int(torch.randint(count, (), generator=generator)) if generator else 0

    batch = store.batch([index], pick=pick)
    images = {name: image.clone() for name, image in batch.images.items()}
    labels = None if batch.labels is None else batch.labels.clone()
    return replace(batch, images=images, labels=labels).to(device)


def patient_gradient(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of one patient's loss by parameter; without those that the loss does not depend on."""
    if not loss.requires_grad:
        return {}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    return {name: gradient for name, gradient in pairs if gradient is not None}


def add_clipped(total: Mapping[str, Tensor], gradient: Mapping[str, Tensor], clip_norm: float) -> None:
    """Add a gradient, scaled to a joint L2 norm of at most `clip_norm`, to a float64 sum, in place.

    Guarantees:
        bounded: the sum moves by at most clip_norm (1 + 1e-5), in L2 over all parameters.
        poison: a gradient that is not finite adds nothing.
    """
    if not gradient:
        return
    norms = [torch.linalg.vector_norm(value) for _, value in _in_float64(gradient)]
    norm = float(torch.stack(norms).norm())
    if not math.isfinite(norm):
        return
    factor = clip_norm / norm if norm > clip_norm else 1.0
    for name, value in _in_float64(gradient):
        total[name].add_(value, alpha=factor)


def _in_float64(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield names and values, one after the other in the same memory: fresh memory costs more than the conversion."""
    largest = max(tensors.values(), key=Tensor.numel)
    room = torch.empty(largest.numel(), dtype=torch.float64, device=largest.device)
    for name, value in tensors.items():
        yield name, room[: value.numel()].view(value.shape).copy_(value)


def noisy_profile(trainer: Trainer, store: ImageStore, indices: NDArray[np.int64]) -> Tensor:
    """Saliency per stream relative to an equal split [S], from 0 to the number of streams that the site holds."""
    private = trainer.run.patient_dp
    assert private is not None
    total = saliency_sum(trainer, store, indices)
    deviation = private.statistics_noise * SALIENCY_SENSITIVITY
    shares, equal = with_noise(total, deviation).clamp_min(0.0) + deviation
    most = sum(name in store.images for name in trainer.model.stream_names)
    return (shares / equal).clamp_max(most).float().to(trainer.device)


@torch.no_grad()
def saliency_sum(trainer: Trainer, store: ImageStore, indices: NDArray[np.int64]) -> Tensor:
    """Sum over patients of shares and equal splits, float64 [2, S].

    Guarantees:
        bounded: leaving a patient out changes it by at most sqrt 2, in L2.
    """
    names = trainer.model.stream_names
    total = torch.zeros(2, len(names), dtype=torch.float64)
    for index in store.holders(indices, names):
        vector = saliency_vector(trainer, one_patient(store, int(index), trainer.device))
        norm = float(vector.norm())
        if math.isfinite(norm):
            total += vector * min(1.0, SALIENCY_SENSITIVITY / norm)
    return total


def saliency_vector(trainer: Trainer, features: Batch) -> Tensor:
    """Shares and equal split of one patient, float64 [2, S]; from this patient alone, to the bit."""
    full = trainer.teacher.encode(features, saliency=trainer.run.masking.saliency)
    shares, present = (value[0].double().cpu() for value in trainer.stream_saliency(full))
    return torch.stack([shares, present / present.sum()])
