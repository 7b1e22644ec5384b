"""How much the CLS token leans on each other token.

    attention  a_n = softmax over tokens of (q_cls k_n / sqrt(d)), summed over heads
    value      a_n ||v_n - mean of v at n's place over the batch||, summed over heads

Only the CLS query's row of attention is computed, never the full matrix. A value that is the same for everybody moves
no embedding apart, however much attention it gets: hence the centring.

Shape legend: R blocks, B subjects, L = 1 + N tokens (CLS first), H heads, d width of a head.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from panfm.models.tokens import Layout

Saliency = Literal["attention", "value"]


class ClsSaliency:
    """Gathers the saliency of one forward pass: of each block what needs its keys and values, the rest at the end."""

    def __init__(self, layout: Layout, kind: Saliency) -> None:
        self._padding = None if bool(layout.valid.all()) else ~layout.valid[:, None]
        self._logits: list[Tensor] = []
        self._norms = CentredNorms(layout) if kind == "value" else None

    def add(self, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """Take in a block: CLS query [B, H, 1, d], keys and values [B, H, L, d]."""
        self._logits.append((query * query.shape[-1] ** -0.5 * keys).sum(dim=-1))
        if self._norms:
            self._norms.add(values)

    def shares(self) -> Tensor:
        """Over all blocks and heads, as shares [B, N] that sum to 1 per subject."""
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
    """Norms of values about the batch's mean at their place.

    A place that one subject alone holds has no mean to speak of: it gets the batch's typical norm.
    """

    def __init__(self, layout: Layout) -> None:
        row = functional.pad((layout.place + 1).masked_fill(~layout.valid, 0), (1, 0))  # CLS and padding share row 0
        self._row = None if bool((row == row[:1]).all()) else row.flatten()
        count = row.flatten().bincount()
        self._share = count.clamp_min(1).reciprocal()[:, None]
        alone = (count < 2)[row[:, 1:]] & layout.valid
        self._alone = alone if bool(alone.any()) else None
        self._known = layout.valid & ~alone
        self._norms: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Take in values [B, H, L, d] of a block."""
        values = values.transpose(1, 2).float()
        centred = values - values.mean(dim=0) if self._row is None else self._centred(values, self._row)
        self._norms.append(torch.linalg.vector_norm(centred, dim=-1))

    def norms(self) -> Tensor:
        """Norms [R, B, H, N] of all blocks; those of padding hold no meaning."""
        norms = torch.stack(self._norms)[:, :, 1:].transpose(2, 3)
        if self._alone is None:
            return norms
        known = self._known[:, None]
        total = torch.where(known, norms, 0.0).sum(dim=(1, 2, 3), keepdim=True)
        typical = total / (known.sum() * norms.shape[2]) if bool(known.any()) else torch.ones_like(total)
        return torch.where(self._alone[:, None], typical, norms)

    def _centred(self, values: Tensor, row: Tensor) -> Tensor:
        """Values [B, L, H, d], whose means are formed in `row` [B L], less their mean; or the mean less them."""
        flat = values.flatten(2).flatten(0, 1).contiguous()
        means = flat.new_zeros(len(self._share), flat.shape[1]).index_add_(0, row, flat).mul_(self._share)
        return means.index_select(0, row).sub_(flat).view(values.shape)
