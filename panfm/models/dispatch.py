"""Mix what each subject's experts make of it, with a backward pass written by hand.

    out_b = sum_k gate_bk expert_(chosen_bk)(x_b)

Subjects are sorted by expert, so that an expert reads one contiguous slice. Autograd would do the same sums; by hand,
every expert's weight gradient is written straight into its place in the stack (autograd stacks them in a second copy of
all experts), and what an expert needs is dropped before the next one starts.

Shape legend: B subjects, L tokens, D width, H hidden width, R experts, K active experts; a slice is n subjects' tokens
[n L, D].
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Stacked = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weight in [R, H, D], bias in [R, H], weight out [R, D, H], bias out [R, D] of R MLPs."""


def mix_experts(x: Tensor, chosen: Tensor, gates: Tensor, experts: Stacked) -> Tensor:
    """Mix the chosen experts' outputs [B, L, D].

    Guarantees:
        idle: an expert that nobody chose gets a gradient of zero.
        first order: a gradient of the gradient is refused.

    Args:
        x: [B, L, D].
        chosen: int64 [B, K], all different for a subject.
        gates: [B, K], of the dtype of x.
    """
    mixed: Tensor = _Mix.apply(x, chosen, gates, *experts)  # type: ignore[no-untyped-call]
    return mixed


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, chosen: Tensor, gates: Tensor, *experts: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)
        subject, back = order // chosen.shape[1], order.argsort()
        ctx.loads = (chosen.flatten().bincount(minlength=len(experts[0])) * x.shape[1]).tolist()
        inputs = x.index_select(0, subject).flatten(0, 1)
        outputs, hiddens = torch.empty_like(inputs), []
        for tokens, output, (weight_in, bias_in, weight_out, bias_out) in zip(
            inputs.split(ctx.loads), outputs.split(ctx.loads), _unstacked(*experts), strict=True
        ):
            before = torch.addmm(bias_in, tokens, weight_in.t())
            after = functional.gelu(before)
            torch.addmm(bias_out, after, weight_out.t(), out=output)
            hiddens += [before, after]
        outputs = _sorted_back(outputs, back, chosen, x)
        ctx.save_for_backward(inputs, outputs, chosen, gates, order, back, experts[0], experts[2], *hiddens)
        return torch.bmm(gates[:, None], outputs).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, outputs, chosen, gates, order, back, weight_in, weight_out, *hiddens = ctx.saved_tensors
        grad_gates = (outputs * grad.reshape(len(grad), 1, outputs.shape[2])).sum(dim=2)
        ups = grad.index_select(0, order // chosen.shape[1]).mul_(gates.flatten()[order][:, None, None]).flatten(0, 1)
        grad_in, grad_out = torch.empty_like(weight_in), torch.empty_like(weight_out)
        grad_bias_in, grad_bias_out = [], []
        slices = zip(inputs.split(ctx.loads), ups.split(ctx.loads), hiddens[::2], hiddens[1::2], strict=True)
        weights = _unstacked(weight_in, weight_out, grad_in, grad_out)
        for (tokens, up, before, after), (w_in, w_out, into_in, into_out) in zip(slices, weights, strict=True):
            torch.mm(up.t(), after, out=into_out)
            grad_bias_out.append(up.sum(dim=0))
            down = torch.ops.aten.gelu_backward(up @ w_out, before)
            torch.mm(down.t(), tokens, out=into_in)
            grad_bias_in.append(down.sum(dim=0))
            torch.mm(down, w_in, out=up)
        grad_x = _sorted_back(ups, back, chosen, grad).sum(dim=1).view_as(grad)
        return grad_x, None, grad_gates, grad_in, torch.stack(grad_bias_in), grad_out, torch.stack(grad_bias_out)


def _unstacked(*stacked: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Expert by expert."""
    return zip(*(each.unbind() for each in stacked), strict=True)


def _sorted_back(slices: Tensor, back: Tensor, chosen: Tensor, like: Tensor) -> Tensor:
    """What stands by expert [B K L, D], by subject again [B, K, L D]; `like` is [B, L, D]."""
    batch, num_active = chosen.shape
    flat = like.shape[1] * like.shape[2]
    return slices.view(batch * num_active, flat).index_select(0, back).view(batch, num_active, flat)
