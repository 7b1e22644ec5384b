"""The model with a fixed list of streams, as a graph that other programs can run: no choice in it depends on a value.

    inputs   one tensor of images per stream [B, C, *shape], float32 in [0, 1], then present, bool [B, S]
    output   embedding [B, E], pooled as the run's `[features]` say

A stream that a subject lacks is computed and masked, so `present` alone decides, and its image may hold anything.

Shape legend: B subjects, S streams, D width, E numbers of an embedding.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from panfm.anatomy import module_name
from panfm.config import StreamConfig
from panfm.data.store import Batch
from panfm.errors import RunError
from panfm.models import PanModel
from panfm.models.backbone import Encoded
from panfm.models.pan import StreamTokenizer
from panfm.models.patch_features import image_features
from panfm.models.pooling import pool
from panfm.models.tokens import Layout
from panfm.seeds import torch_generator


class EmbeddingNetwork(nn.Module):
    """`PanModel.embed` of some streams, without batches of unequal subjects.

    Guarantees:
        equal: to `PanModel.embed` of the same images, up to float rounding.
        absent: the image of a stream that a subject lacks changes nothing, not even if it is NaN.
    """

    stream_of_patch: Tensor
    """int64 [M], the stream of each patch, index into the streams of the graph."""
    model_stream: Tensor
    """int64 [S], index of each stream of the graph into the model's streams."""

    def __init__(self, model: PanModel, streams: Sequence[str]) -> None:
        super().__init__()
        self.configs = {name: model.stream_configs[name] for name in streams}
        self.tokenizer = model.tokenizer
        self.streams = nn.ModuleDict({module_name(name): model.streams[module_name(name)] for name in streams})
        self.backbone = model.backbone
        self.pooling = model.pooling
        self.num_model_streams = len(model.stream_names)
        sizes = torch.tensor([torch.Size(config.grid).numel() for config in self.configs.values()])
        self.register_buffer("stream_of_patch", torch.arange(len(sizes)).repeat_interleave(sizes))
        at = [model.stream_names.index(name) for name in streams]
        self.register_buffer("model_stream", torch.tensor(at))
        self.whitening = model.whitening.only(at) if model.whitening else None

    def forward(self, *inputs: Tensor) -> Tensor:
        """Images of every stream, then `present` -> embedding [B, E]."""
        *images, present = inputs
        tokens = torch.cat([self._tokenize(*pair) for pair in zip(self.configs, images, strict=True)], dim=1)
        valid = present[:, self.stream_of_patch]
        layout = Layout(torch.arange(valid.shape[1]).expand_as(valid), valid)
        encoded: Encoded = self.backbone(
            tokens.masked_fill(~valid[:, :, None], 0.0), layout, keep_blocks=self.pooling.reads_blocks
        )
        stream_of_token = self.model_stream[self.stream_of_patch].expand_as(valid)
        pooled = pool(encoded, self.pooling, stream_of_token, self.num_model_streams)
        return pooled if self.whitening is None else self.whitening(pooled, present)

    def _tokenize(self, name: str, images: Tensor) -> Tensor:
        features = image_features(images, self.configs[name], self.tokenizer)
        return cast(StreamTokenizer, self.streams[module_name(name)])(features)


def trace(network: EmbeddingNetwork) -> ExportedProgram:
    """The network's graph, for any number of subjects from one."""
    inputs, subjects = random_inputs(network.configs), Dim("subjects", min=1)
    with torch.no_grad():
        return torch.export.export(network, inputs, dynamic_shapes={"inputs": tuple({0: subjects} for _ in inputs)})


TOLERANCE = 1e-5
"""Largest difference between an export's embedding and the model's own, in units of its largest number if that is above
1: whitened numbers of images unlike any that it was fitted on may be."""


def random_inputs(streams: Mapping[str, StreamConfig]) -> tuple[Tensor, ...]:
    """Images [B, C, *shape] of every stream, then `present`, bool [B, S]: subjects with all streams, every other one,
    the rest, the first alone, and none. The same numbers every time."""
    generator, column = torch_generator(0, "export"), torch.arange(len(streams))
    present = torch.stack([column >= 0, column % 2 == 0, column % 2 == 1, column == 0, column < 0])
    shapes = [(len(present), config.channels, *config.shape) for config in streams.values()]
    return *(torch.rand(shape, generator=generator) for shape in shapes), present


def batch_of(streams: Sequence[str], inputs: Sequence[Tensor]) -> Batch:
    """The same subjects as the model itself takes them."""
    *images, present = inputs
    rows = {name: torch.nonzero(present[:, column]).squeeze(1) for column, name in enumerate(streams)}
    present_images = {name: image[rows[name]] for name, image in zip(streams, images, strict=True) if len(rows[name])}
    return Batch(len(present), present_images, {name: rows[name] for name in present_images})


def require_equal(expected: Tensor, actual: Tensor) -> float:
    """Return the largest difference of two embeddings [B, D].

    Raises:
        RunError: it is above TOLERANCE, or not a number.
    """
    difference, allowed = float((expected - actual).abs().max()), TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise RunError(f"export: differs from the run's model by {difference:.3g}, expected at most {allowed:.3g}")
    return difference
