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
.001. Ours was kept because it is simpler: there is no 0 / 0, and everything moves after a successful step. The tables
and the commands are in `docs/results/director-experts.md`.

Source: DEX (arXiv 2605.21861); `softmax` is the released code's alignment.
Shape legend: B subjects, L tokens (CLS first), U units that are routed (subjects), D width, H hidden width, R experts,
K active experts.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from panfm.config.model import ModelConfig
from panfm.errors import ConfigError
from panfm.models.backbone import Exploration, Route, Routed
from panfm.models.batch_sums import batch_mean
from panfm.models.dispatch import Experts
from panfm.models.vit import Block, Mlp, VisionTransformer
from panfm.sharing.groups import BACKBONE, DIRECTOR, EXPERTS, ROUTER

Alignment = Literal["cosine", "softmax"]

_ACTIVATION_MOMENTUM = 0.99
_TARGET_TEMPERATURE = 0.5
_SHORTEST = 1e-8


class Director(Mlp):
    """The MLP that carries what the experts share."""

    sharing_group = DIRECTOR


class Router(nn.Module):
    """Chooses K experts for every subject by its CLS token: all tokens of a subject use the same.

    A subclass routes otherwise: other units (`units`) or other logits (`logits`).
    """

    sharing_group = ROUTER
    activation: Tensor

    def __init__(self, width: int, *, num_experts: int, num_active: int, temperature: float) -> None:
        super().__init__()
        self.num_active = num_active
        self.temperature = temperature
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.register_buffer("activation", torch.empty(num_experts), persistent=False)
        self.reset_activation()

    def units(self, x: Tensor) -> Tensor:
        """Cut x [B, L, D] into the units that are routed [U, T, D], each by its first token."""
        return x

    def forward(self, first: Tensor, exploration: Exploration | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Route units by their first tokens [U, D] -> probabilities [U, R], chosen experts [U, K], gates [U, K]."""
        probs = (self.logits(first, exploration) / self.temperature).softmax(dim=-1)
        largest, chosen = probs.topk(self.num_active, dim=-1)
        return probs, chosen, largest / largest.sum(dim=-1, keepdim=True)

    def logits(self, first: Tensor, exploration: Exploration | None) -> Tensor:
        """Logits [U, R], in the parameters' own precision also under autocast."""
        with torch.autocast(first.device.type, enabled=False):
            logits = functional.linear(first.to(self.weight.dtype), self.weight)
        if exploration is None:
            return logits
        return logits + exploration.scale * (exploration.draw(logits) + self.rarity())

    def rarity(self) -> Tensor:
        """Rarity of each expert's activity [R]; exploration favours rare experts."""
        return 1.0 - self.activation / self.activation.sum()

    def reset_activation(self) -> None:
        """Set all experts equally active."""
        self.activation.fill_(1.0 / len(self.activation))

    @torch.no_grad()
    def move_activation(self, mass: Tensor) -> None:
        """Move the running activation by the gate mass [R] of a batch."""
        self.activation.lerp_(mass / mass.sum(), 1.0 - _ACTIVATION_MOMENTUM)


class DirectorExperts(nn.Module):
    """Experts, router and director in place of a block's MLP.

    Guarantees:
        per subject: outputs, gates, alignment and their gradients of one subject do not depend on the others.
        no gradient: the director is moved by `move_director` alone.
    """

    sharing_group = None
    """Every parameter of the layer is its director's, its experts' or its router's."""

    def __init__(self, width: int, hidden: int, router: Router) -> None:
        super().__init__()
        self.director = Director(width, hidden).requires_grad_(requires_grad=False)
        self.experts = self.make_experts(len(router.activation), width, hidden)
        self.router = router

    def make_experts(self, num_experts: int, width: int, hidden: int) -> Experts:
        """Make experts of the director's shape."""
        return Experts(num_experts, width, hidden)

    def forward(self, x: Tensor, exploration: Exploration | None = None) -> Routed:
        """Route x [B, L, D], after the block's second norm, through the experts."""
        units = self.router.units(x)
        probs, chosen, gates = self.router(units[:, 0], exploration)
        return Routed(probs, chosen, gates, x.detach(), self.experts(units, chosen, gates).view_as(x))

    @torch.no_grad()
    def start_experts(self) -> None:
        """Make every expert a copy of the director."""
        for stacked, director in self._expert_and_director():
            stacked.copy_(director.expand_as(stacked))

    @torch.no_grad()
    def move_director(self, mass: Tensor, *, momentum: float) -> None:
        """Group EMA, in place, reading every expert once: the more gate mass [R] an expert had, the more it counts."""
        share = (mass / mass.sum()).to(self.router.weight.dtype)
        for stacked, director in self._expert_and_director():
            director.view(-1).addmv_(stacked.flatten(1).T, share, beta=momentum, alpha=1.0 - momentum)

    def _expert_and_director(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.experts.stacked, self.director.parameters(), strict=True))

    def alignment_loss(self, routed: Routed, valid: Tensor, kind: Alignment) -> Tensor:
        """Distance of each subject's experts from the director [B]: mean over its valid tokens, bool [B, 1 + N];
        registers do not count."""
        with torch.no_grad():
            target = self.director(routed.inputs)
        distance = alignment_distance(routed.outputs, target, kind)[:, : valid.shape[1]]
        return (distance * valid).sum(dim=1) / valid.sum(dim=1)


class ExpertsBlock(Block):
    """Transformer block whose MLP is a layer of experts."""

    mlp: DirectorExperts

    def feed_forward(self, x: Tensor, route: Route, exploration: Exploration | None) -> tuple[Tensor, Routed | None]:
        """Go through the experts, or through their director alone."""
        if route == "director":
            return self.mlp.director(x), None
        routed: Routed = self.mlp(x, exploration)
        return routed.outputs, routed

    def numbers_per_token(self) -> int:
        """Count the numbers that the block fills per token; the director runs beside the experts."""
        mlps = self.mlp.router.num_active + 1
        return 10 * self.attention.out.out_features + mlps * self.mlp.director.numbers_per_token


class DirectorExpertsBackbone(VisionTransformer):
    """Transformer with experts in every block. A subclass may exchange the router or the layer."""

    sharing_groups = frozenset({BACKBONE, DIRECTOR, EXPERTS, ROUTER})
    router_class: type[Router] = Router
    layer_class: type[DirectorExperts] = DirectorExperts

    def make_blocks(self, width: int, depth: int, heads: int, config: ModelConfig) -> list[Block]:
        """Make the blocks.

        Raises:
            ConfigError: `config.experts` has not one number per block, or more experts active than there are.
        """
        counts = _per_block("count", config.experts.count, depth)
        actives = _per_block("active", config.experts.active, depth)
        for block, (count, active) in enumerate(zip(counts, actives, strict=True)):
            if active > count:
                raise ConfigError(f"model.experts.active: {active} in block {block}, expected at most count = {count}")
        hidden, temperature = config.hidden_multiple * width, config.experts.temperature
        routers = [
            self.router_class(width, num_experts=count, num_active=active, temperature=temperature)
            for count, active in zip(counts, actives, strict=True)
        ]
        return [ExpertsBlock(width, heads, self.layer_class(width, hidden, router), config) for router in routers]

    @staticmethod
    def couplings(config: ModelConfig) -> Iterator[str]:
        """Declare the balance loss, which is of a batch; everything else is per subject."""
        if any(config.experts.balance_weight):
            yield "experts.balance-weight: it pulls on the batch's mean, set [0.0, 0.0]"


def _per_block(key: str, numbers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    if len(numbers) not in (1, depth):
        raise ConfigError(
            f"model.experts.{key}: {len(numbers)} numbers, expected one, or one for each of {depth} blocks"
        )
    return numbers if len(numbers) == depth else numbers * depth


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
    importance = batch_mean(probs)
    return probs.shape[1] * (importance * importance.detach()).sum()


def layer_weight(layer: int, num_layers: int) -> float:
    """Weight of the alignment of layer 1..L: 1 / (L - (l - 1)), so that the last weighs most."""
    return 1.0 / (num_layers - (layer - 1))


def dense_name(name: str) -> str:
    """The dense model's name of a parameter: a director's stands for the MLP's; any other name is the same."""
    return name.replace(".mlp.director.", ".mlp.")
