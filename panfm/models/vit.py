"""The dense ViT: CLS token, pre-norm blocks, key padding, and how much CLS leans on each other token.

    attention  a_n = softmax over tokens of (q_cls k_n / sqrt(d)), summed over heads
    value      a_n ||v_n - mean of v at n's patch over the batch||, summed over heads

Saliency computes only the CLS query's row of attention, never the full matrix. A value that is the same for everybody
moves no embedding apart, however much attention it gets: hence the centring.

Shape legend: S blocks, B subjects, L = 1 + N tokens (CLS first), H heads, d width of a head, D width.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from panfm.config.model import ModelConfig
from panfm.data.store import send
from panfm.models.backbone import Backbone, Encoded, Exploration, Route, Routed, Saliency
from panfm.models.batch_sums import batch_mean, batch_sum
from panfm.models.tokens import Layout

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine [B, 1, L, d] of the angles by which queries and keys are turned."""


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn queries or keys [B, H, L, d]: numbers i and i + d / 2 as a pair (arXiv 2104.09864)."""
    cosine, sine = (part.to(x.dtype) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


class Mlp(nn.Sequential):
    """Two linear layers around GELU: the MLP of a dense block or of a director."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.numbers_per_token = 2 * hidden + 2 * width
        """Numbers that it fills per token: before and after GELU, input and output."""


class Attention(nn.Module):
    """Multi-head self-attention with key padding."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        saliency: "ClsSaliency | None" = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Attend; add what CLS attends to, if `saliency` is given."""
        batch, length, width = x.shape
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        if rotation:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if saliency:
            saliency.add(q[:, :, :1], k, v)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class LayerScale(nn.Module):
    """Learned factor per number of the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Scale x [..., D]."""
        return x * self.weight


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, feed_forward: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=config.norm_epsilon)
        self.attention = Attention(width, heads)
        self.scale1 = LayerScale(width) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=config.norm_epsilon)
        self.mlp = feed_forward
        self.scale2 = LayerScale(width) if config.layer_scale else nn.Identity()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        *,
        saliency: "ClsSaliency | None" = None,
        rotation: Rotation | None = None,
        route: Route = "experts",
        exploration: Exploration | None = None,
    ) -> tuple[Tensor, Routed | None]:
        """Transform x [B, L, D]; also return how the experts were chosen, if there are any."""
        x = x + self.scale1(self.attention(self.norm1(x), mask, saliency, rotation))
        change, routed = self.feed_forward(self.norm2(x), route, exploration)
        return x + self.scale2(change), routed

    def feed_forward(self, x: Tensor, route: Route, exploration: Exploration | None) -> tuple[Tensor, Routed | None]:
        """Apply the MLP, for which there is one route."""
        return self.mlp(x), None

    def numbers_per_token(self) -> int:
        """Count the numbers that the block fills per token."""
        return 10 * self.attention.out.out_features + cast(Mlp, self.mlp).numbers_per_token


class VisionTransformer(Backbone):
    """Transformer with a dense MLP in every block."""

    has_saliency = True
    angles: Tensor | None
    """[1 + M, d] by which queries and keys of patches are turned, row 0 for tokens of no patch; None if none are."""

    def __init__(self, width: int, depth: int, heads: int, config: ModelConfig) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(width))
        self.registers = nn.Parameter(torch.zeros(config.registers, width)) if config.registers else None
        self.blocks = nn.ModuleList(self.make_blocks(width, depth, heads, config))
        self.norm = nn.LayerNorm(width, eps=config.norm_epsilon)
        self.register_buffer("angles", None, persistent=False)
        self._recomputes = False

    def make_blocks(self, width: int, depth: int, heads: int, config: ModelConfig) -> list[Block]:
        """Make the blocks, first to last."""
        return [Block(width, heads, Mlp(width, config.hidden_multiple * width), config) for _ in range(depth)]

    @staticmethod
    def couplings(_config: ModelConfig) -> Iterator[str]:
        """Declare that no part couples patients."""
        return iter(())

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        *,
        saliency: Saliency | None = None,
        keep_blocks: bool = False,
        route: Route = "experts",
        exploration: Exploration | None = None,
    ) -> Encoded:
        """Encode tokens [B, N, D]; see `Backbone.forward`."""
        length = 1 + tokens.shape[1]
        x, mask = self._with_registers(torch.cat([self.cls.expand(tokens.shape[0], 1, -1), tokens], dim=1), layout)
        rotation = self._rotation(layout)
        outputs: list[Tensor] = []
        cls_outputs: list[Tensor] = []
        routings: list[Routed] = []
        attended = ClsSaliency(layout, saliency) if saliency else None
        for depth, block in enumerate(self.blocks):
            watched = attended if saliency == "value" or depth == len(self.blocks) - 1 else None
            read: dict[str, Any] = {"saliency": watched, "rotation": rotation, "route": route}
            if self._recomputes and watched is None and torch.is_grad_enabled():
                noise = exploration and exploration.once()
                run_again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
                x, routed = checkpoint(block, x, mask, exploration=noise, **read, **run_again)
            else:
                x, routed = block(x, mask, exploration=exploration, **read)
            if routed is not None:
                routings.append(routed)
            if keep_blocks:
                outputs.append(x[:, 1:length])
                cls_outputs.append(x[:, 0])
        x = self.norm(x)[:, :length]
        shares = attended.shares() if attended else None
        return Encoded(x[:, 0], x[:, 1:], layout, tuple(outputs), shares, tuple(routings), tuple(cls_outputs))

    def _with_registers(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """Add the registers behind CLS and tokens [B, L, D]; also return what attention may look at."""
        mask = layout.key_mask()
        if self.registers is None:
            return x, mask
        if mask is not None:
            mask = functional.pad(mask, (0, len(self.registers)), value=True)
        return torch.cat([x, self.registers.expand(x.shape[0], -1, -1)], dim=1), mask

    def turn_by(self, angles: Tensor) -> None:
        """Turn queries and keys of every patch by angles [M, d], those of other tokens not at all."""
        self.angles = functional.pad(angles, (0, 0, 1, 0))

    def recompute(self) -> None:
        """Keep each block's input alone for the backward pass, where no saliency is read."""
        self._recomputes = True

    def _rotation(self, layout: Layout) -> Rotation | None:
        if self.angles is None:
            return None
        others = 0 if self.registers is None else len(self.registers)
        angles = self.angles[functional.pad(layout.patch_index + 1, (1, others))][:, None]
        return angles.cos(), angles.sin()

    def last_layers(self, count: int) -> list[nn.Module]:
        """Return the last `count` blocks and the last norm."""
        return [*list(self.blocks)[len(self.blocks) - count :], self.norm]

    def numbers_per_token(self) -> list[int]:
        """Count the numbers that each block fills per token."""
        return [cast(Block, block).numbers_per_token() for block in self.blocks]


class ClsSaliency:
    """Saliency of one forward pass, from the queries, keys and values of its blocks."""

    def __init__(self, layout: Layout, kind: Saliency) -> None:
        self._length = 1 + layout.valid.shape[1]
        self._padding = None if layout.is_full else ~layout.valid[:, None]
        self._logits: list[Tensor] = []
        self._norms = CentredNorms(layout) if kind == "value" else None

    def add(self, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """Add a block: CLS query [B, H, 1, d], keys and values [B, H, L, d], with those of registers behind."""
        keys, values = keys[:, :, : self._length], values[:, :, : self._length]
        self._logits.append((query * query.shape[-1] ** -0.5 * keys).sum(dim=-1))
        if self._norms:
            self._norms.add(values)

    def shares(self) -> Tensor:
        """Sum over blocks and heads -> shares [B, N] that sum to 1 per subject."""
        logits = torch.stack(self._logits)[..., 1:]
        if self._padding is None:
            scores = logits.softmax(dim=-1)
        else:
            scores = logits.masked_fill(self._padding, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
        if self._norms:
            scores = scores * self._norms.norms()
        scores = scores.sum(dim=(0, 2))
        return scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-12)


class CentredNorms:
    """Norms of values about the batch's mean at their patch.

    A patch that one subject alone holds has no mean to speak of: it gets the batch's typical norm.
    """

    def __init__(self, layout: Layout) -> None:
        # CLS and padding share row 0.
        row = functional.pad((layout.patch_index + 1).masked_fill(~layout.valid, 0), (1, 0))
        presence = layout.presence
        assert presence is not None, "saliency is of a batch of which nothing is hidden"
        self._row = None if (presence == presence[:1]).all() else row.flatten()
        holders = presence.sum(axis=0)
        count = functional.pad(send(torch.from_numpy(holders), row.device), (1, 0), value=row.numel())
        self._share = count.clamp_min(1).reciprocal()[:, None]
        alone = (count < 2)[row[:, 1:]] & layout.valid
        self._alone = alone if (holders == 1).any() else None
        self._known = layout.valid & ~alone
        self._all_alone = not (holders > 1).any()
        self._norms: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Add a block's values [B, H, L, d]."""
        values = values.transpose(1, 2).float()
        centred = values - batch_mean(values) if self._row is None else self._centred(values, self._row)
        self._norms.append(torch.linalg.vector_norm(centred, dim=-1))

    def norms(self) -> Tensor:
        """Return the norms [S, B, H, N] of all blocks; those of padding hold no meaning."""
        norms = torch.stack(self._norms)[:, :, 1:].transpose(2, 3)
        if self._alone is None:
            return norms
        known = self._known[:, None]
        total = torch.where(known, norms, 0.0).sum(dim=(1, 2, 3), keepdim=True)
        typical = torch.ones_like(total) if self._all_alone else total / (known.sum() * norms.shape[2])
        return torch.where(self._alone[:, None], typical, norms)

    def _centred(self, values: Tensor, row: Tensor) -> Tensor:
        """Values [B, L, H, d], whose means are formed in `row` [B L], less their mean; or the mean less them."""
        flat = values.flatten(2).flatten(0, 1).contiguous()
        means = batch_sum(flat.new_zeros(len(self._share), flat.shape[1]).index_add_(0, row, flat)).mul_(self._share)
        return means.index_select(0, row).sub_(flat).view(values.shape)
