"""The network of a MONAI bundle, whose `scripts/network.py` is a copy of this file. Needs torch, and not panfm."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Embedder(nn.Module):
    """Images of a patient's organs in, one embedding out."""

    def __init__(self, graph: str, shapes: Mapping[str, Sequence[int]]) -> None:
        """Read the graph.

        Args:
            graph: File written by `torch.export.save`.
            shapes: Stream -> channels and voxels, in the order of the graph's inputs.
        """
        super().__init__()
        self.graph = torch.export.load(graph).module()
        self.shapes = {stream: tuple(shape) for stream, shape in shapes.items()}

    def forward(self, image: Tensor | None = None, present: Tensor | None = None, **images: Tensor) -> Tensor:
        """Embed a batch.

        Args:
            image: Of the first stream, float32 [B, C, *shape] in [0, 1].
            present: bool [B, streams], the streams that each patient has; all that are given when left out.
            images: Of the other streams, by their names; any may be left out.
        Returns:
            Embedding [B, width].
        """
        given = images if image is None else {next(iter(self.shapes)): image, **images}
        if not given or (set(given) - set(self.shapes)):
            raise ValueError(f"found images of {sorted(given)}, expected some of {', '.join(self.shapes)}")
        some = next(iter(given.values()))
        full = [given.get(name, some.new_zeros(len(some), *shape)) for name, shape in self.shapes.items()]
        if present is None:
            all_given = torch.tensor([name in given for name in self.shapes], device=some.device)
            present = all_given.expand(len(some), -1)
        embedding: Tensor = self.graph(*full, present)
        return embedding

    def train(self, mode: bool = True) -> "Embedder":
        """The graph is the same in training and inference."""
        return self


def embed(network: Embedder, batches: Iterable[Mapping[str, Any]], device: torch.device) -> np.ndarray[Any, Any]:
    """Embeddings [N, width] of batches of images by stream and `present`."""
    embeddings = []
    with torch.inference_mode():
        for batch in batches:
            images = {name: batch[name].to(device) for name in (*network.shapes, "present")}
            embeddings.append(network(**images).cpu().numpy())
    return np.concatenate(embeddings)
