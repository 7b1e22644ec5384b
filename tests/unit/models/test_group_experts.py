"""Grouped products of experts, the way of batches on CUDA, against the loop over experts."""

import pytest
import torch

from panfm.models.dispatch import group_experts, mix_experts

SUBJECTS, TOKENS, WIDTH, HIDDEN, EXPERTS = 5, 3, 8, 16, 4


def problem(chosen, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    shapes = [(EXPERTS, HIDDEN, WIDTH), (EXPERTS, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH)]
    gates = torch.rand(len(chosen), len(chosen[0]), generator=random)
    tensors = [torch.randn(len(chosen), TOKENS, WIDTH, generator=random), gates]
    tensors += [torch.randn(shape, generator=random) for shape in shapes]
    x, gates, *experts = (tensor.to(dtype).requires_grad_() for tensor in tensors)
    return x, torch.tensor(chosen), gates, tuple(experts)


def numbers(mix, chosen, dtype=torch.float32):
    """Outputs, and the gradients of a weighted sum of them by everything that has one."""
    x, places, gates, experts = problem(chosen, dtype)
    outputs = mix(x, places, gates, experts)
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1))
    (outputs * weights.to(dtype)).sum().backward()
    return [outputs.detach(), *(tensor.grad for tensor in (x, gates, *experts))]


@pytest.mark.parametrize(
    "chosen",
    [
        [[0, 1], [2, 3], [3, 0], [1, 2], [0, 2]],
        [[2, 0], [0, 2], [2, 0], [0, 2], [2, 0]],  # two experts idle
        [[3], [3], [3], [3], [3]],  # all at the last one
        [[1, 3], [1, 3]],
    ],
)
def test_grouped_products_give_what_the_loop_gives(chosen):
    for grouped, looped in zip(numbers(group_experts, chosen), numbers(mix_experts, chosen), strict=True):
        torch.testing.assert_close(grouped, looped, rtol=1e-5, atol=1e-5)  # sums in another order


def test_in_bf16_they_differ_by_its_rounding():
    chosen = [[0, 1], [2, 3], [3, 0], [1, 2], [0, 2]]
    exact = numbers(mix_experts, chosen)
    for grouped, wanted in zip(numbers(group_experts, chosen, torch.bfloat16), exact, strict=True):
        torch.testing.assert_close(grouped.float(), wanted, rtol=0.05, atol=0.02 * float(wanted.abs().max()))


def test_no_value_is_asked_of_the_device():
    """Meta tensors have no values: whoever asks for one fails."""
    x, chosen, gates, experts = problem([[0, 1], [2, 3], [3, 0]], torch.bfloat16)
    on_meta = [tensor.detach().to("meta").requires_grad_() for tensor in (x, gates, *experts)]
    outputs = group_experts(on_meta[0], chosen.to("meta"), on_meta[1], tuple(on_meta[2:]))
    outputs.sum(dim=1).mul(2.0).sum().backward()
    assert outputs.shape == x.shape
    assert all(tensor.grad.shape == tensor.shape for tensor in on_meta)
