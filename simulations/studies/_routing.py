"""Two baselines of Director-Experts that only a study needs: the same layers and parameters, routed otherwise.

    token-routing   every token chooses its own experts, by the same router (a mixture of experts as it is commonly
                    built)
    random-routing  every picture has experts of its own, drawn once and for all from its content; no router learns

Random routing has the sparsity of the others and none of their learning: results that they share come from sparsity.
"""

import hashlib

import torch
from torch import Tensor

from panfm.data.store import Batch
from panfm.models import PanModel
from panfm.models.backbone import Exploration
from panfm.models.director_experts import DirectorExpertsBackbone, Router
from panfm.registry import BACKBONES
from panfm.seeds import torch_generator


class TokenRouter(Router):
    """Routes every token as if it were a picture of one token."""

    def units(self, x: Tensor) -> Tensor:
        """Cut x [B, L, D] into its tokens [B L, 1, D]."""
        return x.flatten(0, 1)[:, None]


class TokenRouted(DirectorExpertsBackbone):
    """Director-Experts whose tokens choose for themselves."""

    router_class = TokenRouter


class RandomRouter(Router):
    """Routes by logits that were drawn for the pictures of the batch."""

    drawn: Tensor

    def logits(self, first: Tensor, exploration: Exploration | None) -> Tensor:
        """Return the drawn logits [B, R]."""
        return self.drawn


class RandomlyRouted(DirectorExpertsBackbone):
    """Director-Experts with logits drawn for every picture, from its own content."""

    router_class = RandomRouter
    seed = 0

    def see(self, features: Batch) -> None:
        """Draw the logits of a batch's pictures."""
        routers = [module for module in self.modules() if isinstance(module, RandomRouter)]
        drawn = torch.stack([self._draw(key, routers) for key in content_keys(features)]).to(self.cls.device)
        for router, logits in zip(routers, drawn.unbind(1), strict=True):
            router.drawn = logits

    def _draw(self, key: str, routers: list[RandomRouter]) -> Tensor:
        """Logits [layers, R] of one picture."""
        generator = torch_generator(self.seed, "random-routing", key)
        return torch.stack([torch.randn(len(router.activation), generator=generator) for router in routers])


BACKBONES.register("token-routing", TokenRouted)
BACKBONES.register("random-routing", RandomlyRouted)


def seed_routing(model: PanModel, seed: int) -> None:
    """Set the seed of a model whose routing is random; nothing for any other model."""
    if isinstance(model.backbone, RandomlyRouted):
        model.backbone.seed = seed


def content_keys(features: Batch) -> list[str]:
    """Digest of each subject's features."""
    hashes = [hashlib.blake2b(digest_size=8) for _ in range(features.size)]
    for stream, rows in features.rows.items():
        for row, image in zip(rows.tolist(), features.images[stream], strict=True):
            hashes[row].update(image.cpu().numpy().tobytes())
    return [digest.hexdigest() for digest in hashes]
