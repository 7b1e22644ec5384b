"""Heads, which training needs and an embedding does not: predictor and summary of every model, and its objective's own.

Hidden tokens are queries only, never keys, so that a hidden organ looks the same to the model as a missing
one. Parameters under `streams` belong to a stream and are shared with that stream's group.

Shape legend: B subjects, K hidden patches, L encoded tokens, S streams, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from panfm.anatomy import module_name
from panfm.config.objective import ObjectiveConfig
from panfm.errors import ConfigError
from panfm.models.backbone import Encoded, PerStream
from panfm.models.tokens import Layout
from panfm.registry import import_class
from panfm.sharing.groups import HEAD


@dataclass(frozen=True)
class ObjectiveHeads:
    """Heads that an objective adds to a model, by name."""

    shared: Mapping[str, nn.Module] = field(default_factory=dict)
    per_stream: Mapping[str, Mapping[str, nn.Module]] = field(default_factory=dict)
    """Stream -> name -> head."""


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
    """Heads of one stream: its queries, and those that the objective adds."""

    def __init__(self, width: int, added: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.hidden_query = nn.Parameter(torch.zeros(width))
        self.summary_query = nn.Parameter(torch.zeros(width))
        _add(self, added)


class Heads(nn.Module):
    """Predictor, summary head, and the heads that the objective adds."""

    sharing_group = HEAD

    def __init__(self, width: int, heads: int, features: Mapping[str, int], objective: ObjectiveConfig) -> None:
        super().__init__()
        added: ObjectiveHeads = import_class(objective.implementation).build_heads(objective, width, features)
        self.streams = PerStream(
            {module_name(name): StreamHead(width, added.per_stream.get(name, {})) for name in features}
        )
        self.predictor = CrossBlock(width, heads)
        self.project = nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width))
        self.summary = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        _add(self, added.shared)

    def stream_heads(self) -> list[StreamHead]:
        """Heads per stream, in the order of their patches."""
        return [cast(StreamHead, head) for head in self.streams.values()]

    def predict(self, encoded: Encoded, hidden: Layout, queries: Tensor) -> Tensor:
        """Predict features [B, K, D] of hidden patches from the encoded visible tokens.

        Args:
            queries: [M, D], one per patch of the vocabulary.
        """
        memory = torch.cat([encoded.cls[:, None], encoded.tokens], dim=1)
        return self.project(self.predictor(queries[hidden.patch_index], memory, encoded.layout.key_mask()))

    def summarise(self, cls: Tensor) -> Tensor:
        """Predict the summary of every stream from CLS [B, D] alone -> [B, S, D]."""
        queries = torch.stack([head.summary_query for head in self.stream_heads()])
        return self.summary(cls[:, None] + queries)


def _add(heads: nn.Module, added: Mapping[str, nn.Module]) -> None:
    for name, head in added.items():
        if hasattr(heads, name):
            raise ConfigError(f"objective: its head {name!r} is in every model already, expected another name")
        heads.add_module(name, head)
