"""The experts of a layer, and the forward pass through those that were chosen.

    out_b = sum_k gate_bk expert_(chosen_bk)(x_b)

There are three ways to compute it. `mix_experts` is for batches, with a backward pass written by hand. `group_experts`
is for batches in bf16 on CUDA: one grouped product instead of a loop, and no wait for the device. `gather_experts`
copies the chosen experts' weights for every subject. For one subject, as in a private step, it is faster where experts
are small (forward and backward, one thread: 1.1 against 1.8 ms at width 48, 4.7 against 8.0 ms at 192 with 50 tokens,
10.7 against 11.5 with 197, 152 against 137 at 768). And no choice in it depends on a value, so it can be exported.

`mix_experts` sorts subjects by expert, so that an expert reads one contiguous slice. Autograd would do the same sums;
by hand, every expert's weight gradient is written straight into its place in the stack (autograd stacks them in a
second copy of all experts), gelu's gradient overwrites what it is computed from, and what is sorted goes back in the
pass that mixes. Hidden activations are kept slice by slice: one buffer for a whole layer was measured slower, because
the allocator gives large ones back to the system and every step pays for fresh pages.

Shape legend: B subjects, L tokens, D width, H hidden width, R experts, K active experts; a slice is n subjects' tokens
[n L, D].
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from panfm.sharing.groups import EXPERTS

Stacked = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weight in [R, H, D], bias in [R, H], weight out [R, D, H], bias out [R, D] of R MLPs."""


class Experts(nn.Module):
    """R MLPs of one shape, stacked."""

    sharing_group = EXPERTS

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.bias_in = nn.Parameter(torch.empty(num_experts, hidden))
        self.weight_out = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.bias_out = nn.Parameter(torch.empty(num_experts, width))

    @property
    def stacked(self) -> Stacked:
        """The four parameters."""
        return self.weight_in, self.bias_in, self.weight_out, self.bias_out

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """Mix the chosen experts' outputs for x [B, L, D]."""
        if torch.compiler.is_exporting() or len(chosen) == 1:
            return gather_experts(x, chosen, gates, self.stacked)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        weight_in, bias_in, weight_out, bias_out = (parameter.to(dtype) for parameter in self.stacked)
        mix = group_experts if x.is_cuda and dtype == torch.bfloat16 and x.shape[2] % 8 == 0 else mix_experts
        return mix(x.to(dtype), chosen, gates.to(dtype), (weight_in, bias_in, weight_out, bias_out))


def gather_experts(x: Tensor, chosen: Tensor, gates: Tensor, experts: Stacked) -> Tensor:
    """Mix the chosen experts' outputs [B, L, D], by copying each subject's experts; see `mix_experts`."""
    weight_in, bias_in, weight_out, bias_out = (parameter[chosen] for parameter in experts)
    hidden = torch.einsum("bld,bkhd->bklh", x, weight_in) + bias_in[:, :, None]
    outputs = torch.einsum("bklh,bkdh->bkld", functional.gelu(hidden), weight_out) + bias_out[:, :, None]
    return torch.einsum("bk,bkld->bld", gates.to(outputs.dtype), outputs)


def group_experts(x: Tensor, chosen: Tensor, gates: Tensor, experts: Stacked) -> Tensor:
    """Mix the chosen experts' outputs [B, L, D] by grouped products; see `mix_experts`. Asks the device for nothing."""
    weight_in, bias_in, weight_out, bias_out = experts
    sorted_experts, order = chosen.flatten().sort(stable=True)
    loads = (sorted_experts[:, None] == torch.arange(len(bias_in), device=x.device)).sum(dim=0) * x.shape[1]
    ends = loads.cumsum(dim=0).to(torch.int32)

    def layer(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        products = functional.grouped_mm(rows.flatten(0, 1), weight.transpose(1, 2), offs=ends)
        return products.view(len(rows), x.shape[1], -1) + bias.index_select(0, sorted_experts)[:, None]

    hidden = functional.gelu(layer(x.index_select(0, order // chosen.shape[1]), weight_in, bias_in))
    outputs = layer(hidden, weight_out, bias_out).index_select(0, order.argsort()).unflatten(0, chosen.shape)
    return (gates[:, :, None, None] * outputs).sum(dim=1)


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
        back = order.argsort().view_as(chosen)
        ctx.loads = (chosen.flatten().bincount(minlength=len(experts[0])) * x.shape[1]).tolist()
        inputs = x.index_select(0, order // chosen.shape[1]).flatten(0, 1)
        outputs, hiddens = torch.empty_like(inputs), []
        for tokens, output, (weight_in, bias_in, weight_out, bias_out) in zip(
            inputs.split(ctx.loads), outputs.split(ctx.loads), _unstacked(*experts), strict=True
        ):
            before = torch.addmm(bias_in, tokens, weight_in.t())
            after = functional.gelu(before)
            torch.addmm(bias_out, after, weight_out.t(), out=output)
            hiddens += [before, after]
        outputs = outputs.view(len(order), x.shape[1] * x.shape[2])
        ctx.save_for_backward(inputs, outputs, gates, order, back, experts[0], experts[2], *hiddens)
        return _gathered_sum(outputs, back, gates).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, outputs, gates, order, back, weight_in, weight_out, *hiddens = ctx.saved_tensors
        ups = grad.reshape(len(grad), outputs.shape[1]).index_select(0, order // back.shape[1])
        grad_gates = torch.linalg.vecdot(outputs, ups)[back]
        ups = ups.mul_(gates.flatten()[order][:, None]).view_as(inputs)
        shapes = (weight_in.shape, weight_in.shape[:2], weight_out.shape, weight_out.shape[:2])
        into = [weight_in.new_empty(shape) for shape in shapes]
        slices = zip(inputs.split(ctx.loads), ups.split(ctx.loads), hiddens[::2], hiddens[1::2], strict=True)
        weights = _unstacked(weight_in, weight_out, *into)
        for (tokens, up, before, after), (w_in, w_out, into_in, into_bias_in, into_out, into_bias_out) in zip(
            slices, weights, strict=True
        ):
            torch.mm(up.t(), after, out=into_out)
            torch.sum(up, dim=0, out=into_bias_out)
            down = up @ w_out
            torch.ops.aten.gelu_backward.grad_input(down, before, grad_input=down)
            torch.mm(down.t(), tokens, out=into_in)
            torch.sum(down, dim=0, out=into_bias_in)
            torch.mm(down, w_in, out=up)
        grad_x = _gathered_sum(ups.view_as(outputs), back).view_as(grad)
        return grad_x, None, grad_gates, *into


def _unstacked(*stacked: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the parameters of one expert after the other."""
    return zip(*(parameter.unbind() for parameter in stacked), strict=True)


def _gathered_sum(rows: Tensor, where: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over K the rows [B K, L D] at `where` [B, K], weighted or not -> [B, L D]; reads and writes each row once."""
    return functional.embedding_bag(where, rows, per_sample_weights=weights, mode="sum")
