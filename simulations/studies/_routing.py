"""Two baselines of Director-Experts that only a study needs: the same layers and parameters, routed otherwise.

    token   every token chooses its own experts, by the same router (a mixture of experts as it is commonly built)
    random  every picture has experts of its own, drawn once and for all from its content; no router learns

Random routing has the sparsity of the others and none of their learning: what it shares with them, sparsity explains.
"""

import hashlib
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from panfm.data.store import Batch
from panfm.models import PanModel
from panfm.models.director_experts import DirectorExperts, Exploration, Routed
from panfm.models.tokens import Layout
from panfm.seeds import torch_generator

Routing = Literal["image", "token", "random"]


class TokenRouted(DirectorExperts):
    """Every token is routed as if it were a picture of one token."""

    def forward(self, x: Tensor, exploration: Exploration | None = None) -> Routed:
        """Route x [B, L, D]; probabilities, choices and gates come for B L tokens."""
        routed = super().forward(x.flatten(0, 1)[:, None], exploration)
        return replace(routed, inputs=x.detach(), outputs=routed.outputs.view_as(x))


class RandomlyRouted(DirectorExperts):
    """The logits are what the model has drawn for the pictures of the batch."""

    drawn: Tensor

    def _logits(self, cls: Tensor, exploration: Exploration | None) -> Tensor:
        return self.drawn


class RandomlyRoutedModel(PanModel):
    """Draws logits for every picture, from its own content."""

    seed: int

    def tokenize(self, maps: Batch, layout: Layout) -> Tensor:
        """As any model does; on the way, settles how the batch is routed."""
        drawn = torch.stack([self._draw(key) for key in content_keys(maps)]).to(self.stream_of_place.device)
        for layer, logits in zip(self.director_experts().values(), drawn.unbind(1), strict=True):
            assert isinstance(layer, RandomlyRouted)
            layer.drawn = logits
        return super().tokenize(maps, layout)

    def _draw(self, key: str) -> Tensor:
        """Logits [layers, R]."""
        layers = self.director_experts().values()
        generator = torch_generator(self.seed, "random-routing", key)
        return torch.stack([torch.randn(len(layer.activation), generator=generator) for layer in layers])


def reroute(model: PanModel, routing: Routing, seed: int) -> None:
    """Exchange how the layers of a model route; parameters stay where they are, and `image` changes nothing."""
    if routing == "image":
        return
    for layer in model.director_experts().values():
        layer.__class__ = TokenRouted if routing == "token" else RandomlyRouted
    if routing == "random":
        model.__class__ = RandomlyRoutedModel
        assert isinstance(model, RandomlyRoutedModel)
        model.seed = seed


def content_keys(maps: Batch) -> list[str]:
    """A digest of each subject's maps."""
    hashes = [hashlib.blake2b(digest_size=8) for _ in range(maps.size)]
    for stream, rows in maps.rows.items():
        for row, image in zip(rows.tolist(), maps.images[stream], strict=True):
            hashes[row].update(image.cpu().numpy().tobytes())
    return [each.hexdigest() for each in hashes]
