"""Patch features of a site's images: kept where they are few, computed for each batch where they are many.

Those that are kept lie in a file without a name in the images' own folder, mapped into memory; in memory where the
images do. So a worker fills as much memory for ten thousand subjects as for a thousand.

Images are taken a few at a time, and each one's features depend on it alone, to the bit, so that neither the memory nor
a number depends on how many images there are.
"""

import logging
import math
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panfm.data.packed import PackedImages
from panfm.data.store import Images, ImageStore, send
from panfm.models import PanModel
from panfm.models.patch_features import image_features, num_patch_features

_KEPT_BYTES = 1 << 26
"""Of all patch features of a store that are kept."""
_CHUNK_BYTES = 1 << 24
"""Of images whose features are computed at a time: 4 of 96^3 voxels, or one larger image."""
_WRITTEN = 64
"""Images whose features are written at a time."""
logger = logging.getLogger(__name__)


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


class KeptFeatures(ImageStore):
    """Patch features that are kept, in memory or in a file mapped into it."""

    read_ahead = False


def feature_store(store: ImageStore, model: PanModel, device: torch.device) -> ImageStore:
    """The streams of a store that a model has, with patch features in the batches."""
    images = {name: store.images[name] for name in model.stream_names if name in store.images}
    rows = {name: store.rows[name] for name in images}
    own = {part.name: getattr(store, part.name) for part in fields(store)} | {"rows": rows, "digests": {}}
    computed = FeatureStore(**own | {"images": images}, model=model, device=device)
    if sum(4 * len(rows[name]) * _num_values(model, name) for name in images) > _KEPT_BYTES:
        return computed
    images_file = next((getattr(_stored(part), "filename", None) for part in images.values()), None)
    if images_file is None:
        kept = {name: computed.images_at(name, np.arange(len(rows[name]))).cpu().numpy() for name in images}
        return KeptFeatures(**own | {"images": kept})
    try:
        return KeptFeatures(**own | {"images": _mapped(computed, Path(images_file).parent)})
    except OSError as error:  # a full disk, or another account's folder
        logger.warning("patch features are computed for each batch, no file can hold them (%s)", error.strerror)
        return computed


def _mapped(computed: FeatureStore, folder: Path) -> dict[str, NDArray[np.float32]]:
    """Stream -> features of all its images, in a file that is gone when nobody reads it any more."""
    shapes: dict[str, tuple[int, ...]] = {}
    with tempfile.TemporaryFile(dir=folder) as file:
        for name, rows in computed.rows.items():
            for start in range(0, len(rows), _WRITTEN):
                part = computed.images_at(name, np.arange(start, min(start + _WRITTEN, len(rows))))
                file.write(part.cpu().numpy().tobytes())
                shapes[name] = (len(rows), *part.shape[1:])
        file.flush()
        values = np.memmap(file, np.float32, mode="r")
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    return {
        name: values[end - math.prod(shape) : end].reshape(shape)
        for (name, shape), end in zip(shapes.items(), ends, strict=True)
    }


def _stored(images: Images) -> NDArray[Any]:
    """The array that images are read from."""
    return images.stored if isinstance(images, PackedImages) else images


def _num_values(model: PanModel, stream: str) -> int:
    """Numbers in the features of one image."""
    config = model.stream_configs[stream]
    return num_patch_features(config, model.tokenizer) * math.prod(config.grid)
