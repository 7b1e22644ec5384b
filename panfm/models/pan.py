"""The pan-organ model: a tokenizer per stream, one shared backbone, heads for training.

State-dict names decide sharing: `streams.<name>.*` and `heads.streams.<name>.*` belong to a stream, `backbone.*` to
everyone, other `heads.*` to training.

Shape legend: B subjects, P subjects of the batch that hold a stream, S streams, M places, N places of the fullest
subject, T tokens of a stream, D width.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from panfm.anatomy import parse_stream
from panfm.config import RunConfig, StreamConfig
from panfm.config.model import ModelConfig
from panfm.config.objective import ObjectiveConfig
from panfm.data.store import Batch
from panfm.models.backbone import Backbone, Encoded
from panfm.models.director_experts import DirectorExperts, Path, dense_name
from panfm.models.heads import Heads
from panfm.models.saliency import Saliency
from panfm.models.stems import patchify, stem_batch, stem_features, stem_step
from panfm.models.tokens import Layout, pack, sincos_positions
from panfm.seeds import torch_generator

SIZES = {"nano": (48, 2, 3), "tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}
"""Width, depth, heads. tiny, small and base as in DeiT (Touvron et al. 2021); nano for laptops."""
_POSITION_SCALE = 0.2
"""Positions are small beside what a token holds, so that the first norm does not drown it."""


class StreamTokenizer(nn.Module):
    """Linear patches of one stream's maps, plus its embedding and fixed positions."""

    position: Tensor

    def __init__(self, stream: StreamConfig, tokenizer: str, width: int) -> None:
        super().__init__()
        self.step = stem_step(stream, tokenizer)
        self.project = nn.Linear(stem_features(stream, tokenizer), width)
        self.embedding = nn.Parameter(torch.zeros(width))
        self.register_buffer("position", _POSITION_SCALE * sincos_positions(stream.grid, width), persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [P, C, *coarse] -> tokens [P, T, D]."""
        return self.project(patchify(maps, self.step)) + self.embedding + self.position


class PanModel(nn.Module):
    """Any non-empty subset of streams in, one embedding out.

    Guarantees:
        independent: a subject's embedding does not depend on the other subjects of the batch, nor on padding
            (up to float rounding).
        absent: a stream that a subject lacks costs nothing and changes nothing.
    """

    stream_of_place: Tensor

    def __init__(self, streams: dict[str, StreamConfig], config: ModelConfig, objective: ObjectiveConfig) -> None:
        super().__init__()
        width, depth, heads = SIZES[config.size]
        self.stream_configs = streams
        self.tokenizer = config.tokenizer
        self.width = width
        self.streams = nn.ModuleDict(
            {name: StreamTokenizer(stream, config.tokenizer, width) for name, stream in streams.items()}
        )
        self.backbone = Backbone(width, depth, heads, config)
        features = {name: stem_features(stream, config.tokenizer) for name, stream in streams.items()}
        self.heads = Heads(width, heads, features, objective)
        sizes = torch.tensor([torch.Size(stream.grid).numel() for stream in streams.values()])
        self.register_buffer("stream_of_place", torch.arange(len(sizes)).repeat_interleave(sizes), persistent=False)

    @property
    def stream_names(self) -> tuple[str, ...]:
        """Streams in the order of their places."""
        return tuple(self.stream_configs)

    @property
    def stream_organs(self) -> tuple[str, ...]:
        """Organ of every stream, in the order of `stream_names`."""
        return tuple(parse_stream(name)[0] for name in self.stream_configs)

    def stem(self, batch: Batch) -> Batch:
        """The batch's maps: parameter-free, so callers may compute them once and keep them."""
        return stem_batch(batch, self.stream_configs, self.tokenizer)

    def layout(self, batch: Batch) -> Layout:
        """Where the tokens of a batch stand."""
        present = torch.zeros(batch.size, len(self.streams), dtype=torch.bool, device=self.stream_of_place.device)
        for index, name in enumerate(self.streams):
            if name in batch.rows:
                present[batch.rows[name], index] = True
        return pack(present, self.stream_of_place)

    def tokenize(self, maps: Batch, layout: Layout) -> Tensor:
        """Tokens [B, N, D] of a batch of maps, standing as `layout` says; zero where padded."""
        start = layout.valid.new_full((maps.size, len(self.stream_of_place)), 0, dtype=torch.long)
        flat, offset = [self.backbone.cls.new_zeros(1, self.width)], 1
        for index, (name, tokenizer) in enumerate(self.streams.items()):
            if name not in maps.images:
                continue
            tokens = tokenizer(maps.images[name])
            places = torch.nonzero(self.stream_of_place == index).squeeze(1)
            rows = torch.arange(offset, offset + tokens.shape[0] * tokens.shape[1], device=tokens.device)
            start[maps.rows[name][:, None], places] = rows.view(tokens.shape[:2])
            flat.append(tokens.flatten(0, 1))
            offset += len(rows)
        source = start.gather(1, layout.place).masked_fill(~layout.valid, 0)
        return torch.cat(flat)[source]

    def encode(
        self, maps: Batch, *, saliency: Saliency | None = None, keep_blocks: bool = False, path: Path = "experts"
    ) -> Encoded:
        """Encode a batch of maps with nothing hidden."""
        layout = self.layout(maps)
        encoded: Encoded = self.backbone(
            self.tokenize(maps, layout), layout, saliency=saliency, keep_blocks=keep_blocks, path=path
        )
        return encoded

    def embed(self, batch: Batch, *, path: Path = "experts") -> Tensor:
        """Embedding [B, D] of a batch of images, wherever it lies: the CLS token after the last norm."""
        return self.encode(self.stem(batch.to(self.stream_of_place.device)), path=path).cls

    def director_experts(self) -> dict[str, DirectorExperts]:
        """Layers with experts, by the prefix of their parameters' names; none in a dense model."""
        return {name: layer for name, layer in self.named_modules() if isinstance(layer, DirectorExperts)}

    def hidden_queries(self) -> Tensor:
        """One query per place [M, D]: the stream's own plus the fixed position."""
        pairs = zip(self.heads.stream_heads(), self.streams.values(), strict=True)
        return torch.cat([head.hidden_query + cast(StreamTokenizer, tokenizer).position for head, tokenizer in pairs])


def build_model(run: RunConfig, streams: Sequence[str] | None = None) -> PanModel:
    """Model of a run with all its streams, or only those named (in the run's order).

    Guarantees:
        seeded by name: an initial parameter depends on the run's seed and its own name, so that a site's subset of
            streams starts with the same weights as the whole model.
        experts: a director starts as the dense model's MLP, and its experts as copies of it.

    Raises:
        ConfigError: `model.experts` has not one number per block, or more experts active than there are.
    """
    names = [name for name in run.streams if streams is None or name in streams]
    with torch.random.fork_rng(devices=[]):
        model = PanModel({name: run.streams[name] for name in names}, run.model, run.objective)
    for name, parameter in model.named_parameters():
        if ".mlp.experts." not in name:
            _initialise(name, parameter, torch_generator(run.seed, "init", dense_name(name)))
    for layer in model.director_experts().values():
        layer.start_experts()
    return model


@torch.no_grad()
def _initialise(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Matrices: Xavier normal; biases zero and norms one; CLS, embeddings and queries: normal, sd 0.02."""
    if parameter.dim() > 1:
        nn.init.xavier_normal_(parameter, generator=generator)
    elif name.endswith(".bias"):
        parameter.zero_()
    elif name.endswith(".weight"):
        parameter.fill_(1.0)
    else:
        parameter.normal_(0.0, 0.02, generator=generator)
