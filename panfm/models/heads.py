"""What training needs and an embedding does not: predictor, summary head, prototypes, patch decoder.

Hidden tokens are queries only, never keys, so that a hidden organ looks the same to the model as a missing
one. Parameters under `streams` belong to a stream and are shared with that stream's group.

Shape legend: B subjects, K hidden places, L encoded tokens, S streams, D width, F features of a patch.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from panfm.config.objectives import DinoConfig, MaeConfig, ObjectiveConfig
from panfm.models.backbone import Encoded, PerStream
from panfm.models.tokens import Layout
from panfm.sharing.groups import HEAD


class CrossBlock(nn.Module):
    """Pre-norm cross-attention and MLP: queries look at encoded tokens, never at one another."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Queries [B, K, D] over memory [B, L, D]; mask bool [B, 1, 1, L] marks what may be looked at."""
        batch, length, width = queries.shape
        q = self._split(self.query(self.norm1(queries)))
        k, v = self.key_value(memory).chunk(2, dim=-1)
        mixed = functional.scaled_dot_product_attention(q, self._split(k), self._split(v), attn_mask=mask)
        queries = queries + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return queries + self.mlp(self.norm2(queries))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, x.shape[-1] // self.heads)).transpose(1, 2)


class StreamHead(nn.Module):
    """What the heads know of one stream: its queries and, for MAE, its patch decoder."""

    def __init__(self, width: int, features: int, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.hidden_query = nn.Parameter(torch.zeros(width))
        self.summary_query = nn.Parameter(torch.zeros(width))
        self.decode = nn.Linear(width, features) if isinstance(objective, MaeConfig) else None


class Heads(nn.Module):
    """Predictor and the objective's own heads."""

    sharing_group = HEAD

    def __init__(self, width: int, heads: int, features: Mapping[str, int], objective: ObjectiveConfig) -> None:
        super().__init__()
        self.streams = PerStream({name: StreamHead(width, size, objective) for name, size in features.items()})
        self.predictor = CrossBlock(width, heads)
        self.project = nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width))
        self.summary = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.prototypes = (
            nn.Linear(width, objective.prototypes, bias=False) if isinstance(objective, DinoConfig) else None
        )

    def stream_heads(self) -> list[StreamHead]:
        """Heads per stream, in the order of their places."""
        return [cast(StreamHead, head) for head in self.streams.values()]

    def predict(self, seen: Encoded, hidden: Layout, queries: Tensor) -> Tensor:
        """Guess features [B, K, D] of hidden places from what the student saw.

        Args:
            queries: [M, D], one per place of the vocabulary.
        """
        memory = torch.cat([seen.cls[:, None], seen.tokens], dim=1)
        valid = functional.pad(seen.layout.valid, (1, 0), value=True)
        mask = None if bool(valid.all()) else valid[:, None, None, :]
        return self.project(self.predictor(queries[hidden.place], memory, mask))

    def summarise(self, cls: Tensor) -> Tensor:
        """Guess the summary of every stream from CLS [B, D] alone -> [B, S, D]."""
        queries = torch.stack([head.summary_query for head in self.stream_heads()])
        return self.summary(cls[:, None] + queries)

    def assign(self, features: Tensor) -> Tensor:
        """Cosine similarity of features [..., D] to the prototypes -> [..., prototypes]."""
        assert self.prototypes is not None
        weight = functional.normalize(self.prototypes.weight, dim=-1)
        return functional.linear(functional.normalize(features, dim=-1), weight)
