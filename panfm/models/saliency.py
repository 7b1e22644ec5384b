"""How much the CLS token leans on each other token, per block.

    attention  a_n = softmax over tokens of (q_cls k_n / sqrt(d)), summed over heads
    value      a_n ||v_n - mean of v at n's place over the batch||, summed over heads

Only the CLS query's row of attention is computed, never the full matrix. A value that is the same for everybody moves
no embedding apart, however much attention it gets: hence the centring.

Shape legend: B subjects, L = 1 + N tokens (CLS first), H heads, d width of a head.
"""

import torch
from torch import Tensor

from panfm.models.tokens import Layout

Parts = tuple[Tensor, Tensor, Tensor]
"""CLS query [B, H, 1, d], keys and values [B, H, L, d] of one block."""


def cls_scores(parts: Parts, layout: Layout, norms: "CentredNorms | None") -> Tensor:
    """CLS attention to every token, summed over heads [B, N]; times the norm of its centred value, if given."""
    query, keys, values = parts
    logits = (query * keys[:, :, 1:]).sum(dim=-1) * query.shape[-1] ** -0.5
    attention = logits.masked_fill(~layout.valid[:, None], -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    if norms is not None:
        attention = attention * norms(values[:, :, 1:])
    return attention.sum(dim=1)


def normalise(scores: Tensor) -> Tensor:
    """Scores [B, N] as shares that sum to 1 per subject."""
    return scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-12)


class CentredNorms:
    """Norms of values about the batch's mean at their place.

    A place that one subject alone holds has no mean to speak of: it gets the batch's typical norm.
    """

    def __init__(self, layout: Layout) -> None:
        self.place = layout.place.reshape(-1)
        valid = layout.valid.reshape(-1, 1)
        self.weight = None if bool(valid.all()) else valid.float()
        count = torch.bincount(self.place, weights=valid.squeeze(1).float()).float()
        self.share = count.clamp_min(1.0).reciprocal()[:, None]
        alone = (count < 2).index_select(0, self.place).view(layout.place.shape)
        self.alone = alone if bool((alone & layout.valid).any()) else None
        self.valid = layout.valid

    def __call__(self, values: Tensor) -> Tensor:
        """Values [B, H, N, d] -> norms [B, H, N]; those of padding hold no meaning."""
        batch, heads, tokens, width = values.shape
        flat = values.transpose(1, 2).reshape(batch * tokens, heads * width).float()
        counted = flat if self.weight is None else flat * self.weight
        means = flat.new_zeros(len(self.share), heads * width).index_add_(0, self.place, counted) * self.share
        centred = (flat - means.index_select(0, self.place)).view(batch, tokens, heads, width)
        norms = torch.linalg.vector_norm(centred, dim=-1).transpose(1, 2)
        return norms if self.alone is None else self._fill(norms, self.alone)

    def _fill(self, norms: Tensor, alone: Tensor) -> Tensor:
        known = (self.valid & ~alone)[:, None].expand_as(norms)
        typical = norms[known].mean() if bool(known.any()) else norms.new_ones(())
        return torch.where(alone[:, None], typical, norms)
