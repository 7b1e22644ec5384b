"""Patch features of a site's images: kept in memory where they are few, computed for each batch where they are many.

Images are taken a few at a time, and each one's features depend on it alone, to the bit, so that neither the memory nor
a number depends on how many images there are.
"""

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panfm.data.store import ImageStore, send
from panfm.models import PanModel
from panfm.models.patch_features import image_features, num_patch_features

_KEPT_BYTES = 1 << 26
"""Of all patch features of a store that are kept in memory."""
_CHUNK_BYTES = 1 << 24
"""Of images whose features are computed at a time: 4 of 96^3 voxels, or one larger image."""


@dataclass(frozen=True, eq=False, kw_only=True)
class FeatureStore(ImageStore):
    """Images whose batches hold their patch features, computed when a batch is made."""

    model: PanModel
    device: torch.device

    def images_at(self, stream: str, positions: NDArray[np.int64]) -> Tensor:
        """Patch features of images by their positions, [n, C', *coarse], on the device."""
        config, tokenizer = self.model.stream_configs[stream], self.model.tokenizer
        size = max(1, _CHUNK_BYTES // (4 * config.channels * math.prod(config.shape)))
        parts = []
        for start in range(0, len(positions), size):
            images = super().images_at(stream, positions[start : start + size])
            parts.append(image_features(send(images, self.device), config, tokenizer))
        return torch.cat(parts)


def feature_store(store: ImageStore, model: PanModel, device: torch.device) -> ImageStore:
    """The streams of a store that a model has, with patch features in the batches."""
    images = {name: store.images[name] for name in model.stream_names if name in store.images}
    own = replace(store, images=images, rows={name: store.rows[name] for name in images}, digests={})
    computed = FeatureStore(**{part.name: getattr(own, part.name) for part in fields(own)}, model=model, device=device)
    if sum(4 * len(own.rows[name]) * _num_values(model, name) for name in images) > _KEPT_BYTES:
        return computed
    kept = {name: computed.images_at(name, np.arange(len(own.rows[name]))).cpu().numpy() for name in images}
    return replace(own, images=kept)


def _num_values(model: PanModel, stream: str) -> int:
    """Numbers in the features of one image."""
    config = model.stream_configs[stream]
    return num_patch_features(config, model.tokenizer) * math.prod(config.grid)
