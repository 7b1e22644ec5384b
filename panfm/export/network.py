"""The model with a fixed list of streams, as a graph that other programs can run: no choice in it depends on a value.

    inputs   one tensor of images per stream [B, C, *shape], float32 in [0, 1], then present, bool [B, S]
    output   embedding [B, D]

A stream that a subject lacks is computed and masked, so `present` alone decides, and its image may hold anything.

Shape legend: B subjects, S streams, D width.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from panfm.export.compare import random_inputs
from panfm.models import PanModel
from panfm.models.backbone import Encoded
from panfm.models.pan import StreamTokenizer
from panfm.models.stems import stem_images
from panfm.models.tokens import Layout


class EmbeddingNetwork(nn.Module):
    """`PanModel.embed` of some streams, without batches of unequal subjects.

    Guarantees:
        equal: to `PanModel.embed` of the same images, up to float rounding.
        absent: the image of a stream that a subject lacks changes nothing, not even if it is NaN.
    """

    stream_of_place: Tensor

    def __init__(self, model: PanModel, streams: Sequence[str]) -> None:
        super().__init__()
        self.configs = {name: model.stream_configs[name] for name in streams}
        self.tokenizer = model.tokenizer
        self.streams = nn.ModuleDict({name: model.streams[name] for name in streams})
        self.backbone = model.backbone
        sizes = torch.tensor([torch.Size(config.grid).numel() for config in self.configs.values()])
        self.register_buffer("stream_of_place", torch.arange(len(sizes)).repeat_interleave(sizes))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Images of every stream, then `present` -> embedding [B, D]."""
        *images, present = inputs
        tokens = torch.cat([self._tokenize(*pair) for pair in zip(self.streams, images, strict=True)], dim=1)
        valid = present[:, self.stream_of_place]
        layout = Layout(torch.arange(valid.shape[1]).expand_as(valid), valid)
        encoded: Encoded = self.backbone(tokens.masked_fill(~valid[:, :, None], 0.0), layout)
        return encoded.cls

    def _tokenize(self, name: str, images: Tensor) -> Tensor:
        maps = stem_images(images, self.configs[name], self.tokenizer)
        return cast(StreamTokenizer, self.streams[name])(maps)


def trace(network: EmbeddingNetwork) -> ExportedProgram:
    """The network's graph, for any number of subjects from one."""
    inputs, subjects = random_inputs(network.configs), Dim("subjects", min=1)
    with torch.no_grad():
        return torch.export.export(network, inputs, dynamic_shapes={"inputs": tuple({0: subjects} for _ in inputs)})
