"""The shared transformer: CLS, pre-norm blocks, key padding. A block's MLP is dense, or experts and their director.

Shape legend: B subjects, L = 1 + N tokens (CLS first), H heads, d width of a head, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from panfm.config.model import ModelConfig
from panfm.errors import ConfigError
from panfm.models.director_experts import DirectorExperts, Exploration, Path, Routed, mlp
from panfm.models.saliency import ClsSaliency, Saliency
from panfm.models.tokens import Layout

_DEFAULT = ModelConfig()


@dataclass(frozen=True)
class Encoded:
    """What the backbone makes of a batch."""

    cls: Tensor
    """[B, D], after the last norm."""
    tokens: Tensor
    """[B, N, D], after the last norm; padded rows hold no meaning."""
    layout: Layout
    blocks: tuple[Tensor, ...]
    """Token outputs [B, N, D] of every block, before the last norm; empty unless asked for."""
    saliency: Tensor | None
    """[B, N] share of the CLS token's attention, sums to 1 over a subject's tokens; None unless asked for."""
    routed: tuple[Routed, ...] = ()
    """How every block routed the batch; empty unless it went through experts."""


class Attention(nn.Module):
    """Multi-head self-attention with key padding."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, saliency: ClsSaliency | None = None) -> Tensor:
        """Attend; `saliency`, if given, gathers what CLS attends to."""
        batch, length, width = x.shape
        q, k, v = (each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, dim=2))
        if saliency:
            saliency.add(q[:, :, :1], k, v)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, feed_forward: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = feed_forward

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        *,
        saliency: ClsSaliency | None = None,
        path: Path = "experts",
        exploration: Exploration | None = None,
    ) -> tuple[Tensor, Routed | None]:
        """One block; passes on how the experts were chosen."""
        x = x + self.attention(self.norm1(x), mask, saliency)
        if not isinstance(self.mlp, DirectorExperts):
            return x + self.mlp(self.norm2(x)), None
        if path == "director":
            return x + self.mlp.director(self.norm2(x)), None
        routed: Routed = self.mlp(self.norm2(x), exploration)
        return x + routed.outputs, routed


class Backbone(nn.Module):
    """Transformer over any subset of places."""

    def __init__(self, width: int, depth: int, heads: int, config: ModelConfig = _DEFAULT) -> None:
        """Build it.

        Raises:
            ConfigError: `config.experts` has not one number per block, or more experts active than there are.
        """
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(width, heads, layer) for layer in _feed_forwards(config, width, depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        *,
        saliency: Saliency | None = None,
        keep_blocks: bool = False,
        path: Path = "experts",
        exploration: Exploration | None = None,
    ) -> Encoded:
        """Encode tokens [B, N, D]. Padding is never attended to; a subject with no token is its CLS alone.

        Args:
            path: Through the experts or through the directors alone; a dense block has one path.
            exploration: Noise for the routers, in training.
        """
        x = torch.cat([self.cls.expand(len(tokens), 1, -1), tokens], dim=1)
        valid = functional.pad(layout.valid, (1, 0), value=True)
        mask = None if bool(valid.all()) else valid[:, None, None, :]
        blocks: list[Tensor] = []
        routes: list[Routed] = []
        leaned = ClsSaliency(layout, saliency) if saliency else None
        for depth, block in enumerate(self.blocks):
            watched = leaned if saliency == "value" or depth == len(self.blocks) - 1 else None
            x, routed = block(x, mask, saliency=watched, path=path, exploration=exploration)
            if routed is not None:
                routes.append(routed)
            if keep_blocks:
                blocks.append(x[:, 1:])
        x = self.norm(x)
        share = leaned.shares() if leaned else None
        return Encoded(x[:, 0], x[:, 1:], layout, tuple(blocks), share, tuple(routes))


def _feed_forwards(config: ModelConfig, width: int, depth: int) -> list[nn.Module]:
    """The MLP of every block."""
    hidden = config.hidden_multiple * width
    if config.backbone == "dense":
        return [mlp(width, hidden) for _ in range(depth)]
    counts = _per_block("count", config.experts.count, depth)
    actives = _per_block("active", config.experts.active, depth)
    for block, (count, active) in enumerate(zip(counts, actives, strict=True)):
        if active > count:
            raise ConfigError(f"model.experts.active: {active} in block {block}, expected at most count = {count}")
    temperature = config.experts.temperature
    return [
        DirectorExperts(width, hidden, num_experts=count, num_active=active, temperature=temperature)
        for count, active in zip(counts, actives, strict=True)
    ]


def _per_block(key: str, numbers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    if len(numbers) not in (1, depth):
        raise ConfigError(
            f"model.experts.{key}: {len(numbers)} numbers, expected one, or one for each of {depth} blocks"
        )
    return numbers if len(numbers) == depth else numbers * depth
