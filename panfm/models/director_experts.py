"""A block's MLP as a pool of experts and one director (DEX): experts specialise, the director carries what they share.

    logits_r   router(CLS)_r + s (randn + 1 - c_r / sum c)    s: scale of the noise, 0 outside training
    probs      softmax(logits / temperature)                  gates: the K largest, over their sum
    output     sum over the K of gate_k expert_k(token)       all tokens of a subject use the same experts
    director   m director + (1 - m) sum_r Omega_r expert_r    Omega_r: expert r's share of the batch's gate mass
    c          .99 c + .01 Omega                              running activation
    balance    R sum_r imp_r stopgrad(imp_r)                  imp: mean probs over the batch
    alignment  cosine   1 - cos(output, director)             the director's output is a target, without gradient
               softmax  H(softmax(director / .5), softmax(output))    over features

Dispatch is a loop over the experts, each reading one contiguous slice of the subjects sorted by expert (`dispatch.py`):
measured faster than a grouped product padded to the busiest expert at every size tried (48 to 192 wide, 8 and 16
experts), and at 192 wide than torch's unpadded one (`grouped_mm`).

Two deviations from the authors' released code:

                                  here                              released code
    expert_r in `director`        as the optimiser has updated it   as it was before the optimiser's step
    c before the first batch      1 / R: shares move slowly         0: the first batch's Omega is all of c / sum c

Measured by `study dex`, 500 steps, on draw 100 (seeds 100 to 102) and draw 200 (seeds 200 to 204), each alone and both:
every 95 % interval of the paired difference contains 0. The released start and order together changed nmi by
-.026 +- .108 and -.001 +- .003, the held-out probe by -.001 +- .012 and +.003 +- .010, and validation loss by less than
.001. Ours was kept as the simpler: no 0 / 0, and all that moves moves after a successful step. The tables and the
commands are in `docs/results/director-experts.md`.

Source: DEX (arXiv 2605.21861); `softmax` is the released code's alignment.
Shape legend: B subjects, L tokens (CLS first), D width, H hidden width, R experts, K active experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from panfm.models.dispatch import mix_experts

Path = Literal["experts", "director"]
"""Which of the two a forward pass goes through."""
Alignment = Literal["cosine", "softmax"]

_ACTIVATION_MOMENTUM = 0.99
_TARGET_TEMPERATURE = 0.5
_SHORTEST = 1e-8


@dataclass(frozen=True)
class Exploration:
    """Noise on the router's logits, for training only."""

    scale: float
    draw: Callable[[Tensor], Tensor]
    """Logits [B, R] of the next layer -> standard normal noise of their shape."""

    @classmethod
    def of(cls, scale: float, generator: torch.Generator) -> Self:
        """Noise drawn from a generator."""
        return cls(scale, lambda x: torch.randn(x.shape, generator=generator, device=generator.device).to(x))


@dataclass(frozen=True)
class Routed:
    """How one layer routed a batch, and what its losses need."""

    probs: Tensor
    """[B, R] probabilities of the experts, noise included."""
    chosen: Tensor
    """int64 [B, K] experts of each subject, the most probable first."""
    gates: Tensor
    """[B, K] their weights, which sum to 1."""
    inputs: Tensor
    """[B, L, D], without gradient."""
    outputs: Tensor
    """[B, L, D] what the experts made of the inputs."""

    def mass(self) -> Tensor:
        """Gate mass of every expert [R]; sums to the number of subjects."""
        empty = self.gates.new_zeros(self.probs.shape[1])
        return empty.index_add(0, self.chosen.flatten(), self.gates.detach().flatten())


def mlp(width: int, hidden: int) -> nn.Sequential:
    """The MLP of a dense block, of a director, and the shape of an expert."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Experts(nn.Module):
    """R MLPs of one shape, stacked."""

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.bias_in = nn.Parameter(torch.empty(num_experts, hidden))
        self.weight_out = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.bias_out = nn.Parameter(torch.empty(num_experts, width))

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """Mix the chosen experts' outputs for x [B, L, D]."""
        if len(chosen) == 1:
            return self._gathered(x[0], chosen[0], gates[0])[None]
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        stacked = (self.weight_in, self.bias_in, self.weight_out, self.bias_out)
        weight_in, bias_in, weight_out, bias_out = (each.to(dtype) for each in stacked)
        return mix_experts(x.to(dtype), chosen, gates.to(dtype), (weight_in, bias_in, weight_out, bias_out))

    def _gathered(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """One subject's tokens [L, D] through its experts [K], without sorting: faster for one."""
        hidden = torch.einsum("ld,khd->klh", x, self.weight_in[chosen]) + self.bias_in[chosen][:, None]
        outputs = torch.einsum("klh,kdh->kld", functional.gelu(hidden), self.weight_out[chosen])
        outputs = outputs + self.bias_out[chosen][:, None]
        return torch.einsum("k,kld->ld", gates.to(outputs.dtype), outputs)


class DirectorExperts(nn.Module):
    """Experts, router and director in place of a block's MLP.

    Guarantees:
        per subject: outputs, gates, alignment and their gradients of one subject do not depend on the others.
        no gradient: the director is moved by `move_director` alone.
    """

    activation: Tensor

    def __init__(self, width: int, hidden: int, *, num_experts: int, num_active: int, temperature: float) -> None:
        super().__init__()
        self.num_active = num_active
        self.temperature = temperature
        self.director = mlp(width, hidden).requires_grad_(requires_grad=False)
        self.experts = Experts(num_experts, width, hidden)
        self.router = nn.Linear(width, num_experts, bias=False)
        self.register_buffer("activation", torch.empty(num_experts), persistent=False)
        self.reset_activation()

    def forward(self, x: Tensor, exploration: Exploration | None = None) -> Routed:
        """Route x [B, L, D], after the block's second norm, through the experts."""
        probs = (self._logits(x[:, 0], exploration) / self.temperature).softmax(dim=-1)
        largest, chosen = probs.topk(self.num_active, dim=-1)
        gates = largest / largest.sum(dim=-1, keepdim=True)
        return Routed(probs, chosen, gates, x.detach(), self.experts(x, chosen, gates))

    def _logits(self, cls: Tensor, exploration: Exploration | None) -> Tensor:
        """Router's logits [B, R], in the parameters' own precision also under autocast."""
        with torch.autocast(cls.device.type, enabled=False):
            logits = self.router(cls.to(self.router.weight.dtype))
        if exploration is None:
            return logits
        seldom = 1.0 - self.activation / self.activation.sum()
        return logits + exploration.scale * (exploration.draw(logits) + seldom)

    def reset_activation(self) -> None:
        """All experts equally active."""
        self.activation.fill_(1.0 / len(self.activation))

    @torch.no_grad()
    def start_experts(self) -> None:
        """Make every expert a copy of the director."""
        for stacked, director in self._expert_and_director():
            stacked.copy_(director.expand_as(stacked))

    @torch.no_grad()
    def move_activation(self, mass: Tensor) -> None:
        """Take in the gate mass [R] of a batch."""
        self.activation.lerp_(mass / mass.sum(), 1.0 - _ACTIVATION_MOMENTUM)

    @torch.no_grad()
    def move_director(self, mass: Tensor, *, momentum: float) -> None:
        """Group EMA, in place, reading every expert once: the more gate mass [R] an expert had, the more it counts."""
        share = (mass / mass.sum()).to(self.router.weight.dtype)
        for stacked, director in self._expert_and_director():
            director.view(-1).addmv_(stacked.flatten(1).T, share, beta=momentum, alpha=1.0 - momentum)

    def _expert_and_director(self) -> list[tuple[Tensor, Tensor]]:
        experts = (self.experts.weight_in, self.experts.bias_in, self.experts.weight_out, self.experts.bias_out)
        return list(zip(experts, self.director.parameters(), strict=True))

    def alignment_loss(self, routed: Routed, valid: Tensor, kind: Alignment) -> Tensor:
        """How far each subject's experts are from the director [B]: mean over its valid tokens (bool [B, L])."""
        with torch.no_grad():
            target = self.director(routed.inputs)
        distance = alignment_distance(routed.outputs, target, kind)
        return (distance * valid).sum(dim=1) / valid.sum(dim=1)


def alignment_distance(outputs: Tensor, target: Tensor, kind: Alignment) -> Tensor:
    """Distance of the experts' outputs [..., D] to the director's -> [...]."""
    if kind == "cosine":
        distance: Tensor = _CosineDistance.apply(outputs.float(), target.float())[0]  # type: ignore[no-untyped-call]
        return distance
    wanted = (target.float() / _TARGET_TEMPERATURE).softmax(dim=-1)
    return -(wanted * outputs.float().log_softmax(dim=-1)).sum(dim=-1)


class _CosineDistance(torch.autograd.Function):
    """1 - cos of outputs and target [..., D]; lengths count as `_SHORTEST` at least.

    Its gradient, -target / (|o| |t|) + output cos / |o|^2, is one pass over each.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = outputs.norm(dim=-1)
        floored = length.clamp_min(_SHORTEST)
        toward = 1.0 / (floored * target.norm(dim=-1).clamp_min(_SHORTEST))
        cosine = torch.linalg.vecdot(outputs, target) * toward
        along = torch.where(length < _SHORTEST, 0.0, cosine / floored.square())
        return 1.0 - cosine, toward, along

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        outputs, target, toward, along = ctx.saved_tensors
        return torch.addcmul(target * (-grad * toward)[..., None], outputs, (grad * along)[..., None]), None


def balance_loss(probs: Tensor) -> Tensor:
    """R sum imp stopgrad(imp) of probabilities [B, R]; 1 when all experts are equally probable."""
    importance = probs.mean(dim=0)
    return probs.shape[1] * (importance * importance.detach()).sum()


def layer_weight(layer: int, num_layers: int) -> float:
    """Weight of the alignment of layer 1..L: 1 / (L - (l - 1)), so that the last weighs most."""
    return 1.0 / (num_layers - (layer - 1))


def dense_name(name: str) -> str:
    """The dense model's name of a parameter: a director's stands for the MLP's; any other name is the same."""
    return name.replace(".mlp.director.", ".mlp.")
