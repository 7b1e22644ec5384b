"""The shared transformer: CLS, pre-norm blocks, key padding.

Shape legend: B subjects, L = 1 + N tokens (CLS first), H heads, d width of a head, D width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from panfm.models.saliency import CentredNorms, Parts, cls_scores, normalise
from panfm.models.tokens import Layout

Saliency = Literal["attention", "value"]


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


class Attention(nn.Module):
    """Multi-head self-attention with key padding."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Parts]:
        """Attend. Returns the output [B, L, D] and the CLS query [B, H, 1, d], keys and values [B, H, L, d]."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width)), (q[:, :, :1], k, v)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Parts]:
        """One block; passes on the attention's CLS query, keys and values."""
        mixed, parts = self.attention(self.norm1(x), mask)
        x = x + mixed
        return x + self.mlp(self.norm2(x)), parts


class Backbone(nn.Module):
    """Transformer over any subset of places."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(
        self, tokens: Tensor, layout: Layout, *, saliency: Saliency | None = None, keep_blocks: bool = False
    ) -> Encoded:
        """Encode tokens [B, N, D]. Padding is never attended to; a subject with no token is its CLS alone."""
        x = torch.cat([self.cls.expand(len(tokens), 1, -1), tokens], dim=1)
        valid = functional.pad(layout.valid, (1, 0), value=True)
        mask = None if bool(valid.all()) else valid[:, None, None, :]
        blocks: list[Tensor] = []
        scores: list[Tensor] = []
        norms = CentredNorms(layout) if saliency == "value" else None
        for depth, block in enumerate(self.blocks):
            x, parts = block(x, mask)
            if keep_blocks:
                blocks.append(x[:, 1:])
            if saliency == "value" or (saliency == "attention" and depth == len(self.blocks) - 1):
                scores.append(cls_scores(parts, layout, norms))
        x = self.norm(x)
        share = normalise(torch.stack(scores).sum(0)) if scores else None
        return Encoded(x[:, 0], x[:, 1:], layout, tuple(blocks), share)
