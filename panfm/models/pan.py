"""The pan-organ model: a tokenizer per stream, one shared backbone, heads for training.

Modules decide sharing, by the tag `sharing_group`: a tokenizer and the heads of a stream belong to the stream, the
backbone's parts to the groups that it names, other heads to training.

Shape legend: B subjects, P subjects of the batch that hold a stream, S streams, M patches, N patches of the fullest
subject, T tokens of a stream, D width.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from panfm.anatomy import module_name, parse_stream
from panfm.config import RunConfig, StreamConfig
from panfm.config.features import FeaturesConfig
from panfm.config.model import ModelConfig
from panfm.config.objective import ObjectiveConfig
from panfm.config.parts import PartsConfig
from panfm.config.sharing import SharingConfig
from panfm.config.task import TaskConfig
from panfm.data.store import Batch, send
from panfm.errors import ConfigError
from panfm.models.backbone import Backbone, Encoded, PerStream, Route, Saliency, parameter_groups
from panfm.models.director_experts import DirectorExperts, dense_name
from panfm.models.heads import Heads
from panfm.models.patch_features import batch_features, num_patch_features, patch_step, patchify
from panfm.models.pooling import check_layers, embedding_size, pool
from panfm.models.tokens import Layout, pack, rotary_angles, sincos_positions
from panfm.registry import BACKBONES
from panfm.seeds import torch_generator
from panfm.sharing.groups import split_state

if TYPE_CHECKING:
    from panfm.models.whitening import Whitening

SIZES = {
    "nano": (48, 2, 3),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
"""Width, depth, heads. tiny, small and base as in DeiT (Touvron et al. 2021), large as in ViT (Dosovitskiy et al.
2021); nano for laptops."""
TASK_HEAD = "task"
"""Name of the head of a run's `[task]` among a model's heads: a linear layer on the embedding."""
_POSITION_SCALE = 0.2
"""Positions are small beside what a token holds, so that the first norm does not drown it."""


class StreamTokenizer(nn.Module):
    """Projects the patches of one stream's features linearly, and adds the stream's embedding and its positions."""

    position: Tensor

    def __init__(self, stream: StreamConfig, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.step = patch_step(stream, config.tokenizer)
        self.project = nn.Linear(num_patch_features(stream, config.tokenizer), width)
        self.embedding = nn.Parameter(torch.zeros(width))
        self.adds_position = config.positions != "rotary"
        if config.positions == "learned":
            self.position = nn.Parameter(torch.zeros(math.prod(stream.grid), width))
        else:
            self.register_buffer("position", _POSITION_SCALE * sincos_positions(stream.grid, width), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Project patch features [P, C, *coarse] to tokens [P, T, D]."""
        tokens = self.project(patchify(features, self.step)) + self.embedding
        return tokens + self.position if self.adds_position else tokens


class PanModel(nn.Module):
    """Encodes any non-empty subset of streams into one embedding.

    Guarantees:
        independent: a subject's embedding does not depend on the other subjects of the batch, nor on padding
            (up to float rounding).
        absent: a stream that a subject lacks costs nothing and changes nothing.
    """

    stream_of_patch: Tensor

    def __init__(
        self,
        streams: dict[str, StreamConfig],
        config: ModelConfig,
        objective: ObjectiveConfig,
        features: FeaturesConfig,
        task: TaskConfig | None = None,
    ) -> None:
        super().__init__()
        width, depth, heads = SIZES[config.size]
        check_layers(features, depth)
        self.stream_configs = streams
        self.tokenizer = config.tokenizer
        self.width = width
        self.pooling = features
        self.embedding_size = embedding_size(features, width=width, streams=len(streams), depth=depth)
        self.whitening: Whitening | None = None
        """Of embeddings; set after training, by `panfm whiten` or the end of a run."""
        self.streams = PerStream(
            {module_name(name): StreamTokenizer(own, config, width) for name, own in streams.items()}
        )
        self.backbone: Backbone = BACKBONES.load(config.backbone)(width, depth, heads, config)
        if config.positions == "rotary":
            self.backbone.turn_by(_angles(streams, width // heads))
        sizes = {name: num_patch_features(stream, config.tokenizer) for name, stream in streams.items()}
        self.heads = Heads(width, heads, sizes, objective)
        self.task = task
        if task is not None:
            self.heads.add_module(TASK_HEAD, nn.Linear(self.embedding_size, len(task.outputs)))
        self._places = _stream_of_patch(streams)
        self.register_buffer("stream_of_patch", self._places, persistent=False)
        ends = np.cumsum([math.prod(stream.grid) for stream in streams.values()]).tolist()
        self.patches_of = {name: slice(*ends) for name, *ends in zip(streams, [0, *ends], ends, strict=False)}
        """Where the patches of each stream stand among all."""
        self._groups: dict[str, str] = {}
        self.trained = frozenset(dict(self.named_parameters()))
        """Names of the parameters that a run trains."""

    @property
    def stream_names(self) -> tuple[str, ...]:
        """Streams in the order of their patches."""
        return tuple(self.stream_configs)

    @property
    def stream_organs(self) -> tuple[str, ...]:
        """Organ of every stream, in the order of `stream_names`."""
        return tuple(parse_stream(name)[0] for name in self.stream_configs)

    def patch_features(self, batch: Batch) -> Batch:
        """Patch features of a batch. They need no parameters, so callers may compute them once and keep them."""
        return batch_features(batch, self.stream_configs, self.tokenizer)

    def layout(self, batch: Batch) -> Layout:
        """Layout of a batch's tokens."""
        return pack(self.present(batch), self._places).to(self.stream_of_patch.device)

    def present(self, batch: Batch) -> Tensor:
        """Which subject has which of the model's streams, bool [B, S], on the CPU."""
        present = torch.zeros(batch.size, len(self.streams), dtype=torch.bool)
        for index, name in enumerate(self.stream_names):
            if name in batch.rows:
                present[batch.rows[name], index] = True
        return present

    def tokenize(self, features: Batch, layout: Layout) -> Tensor:
        """Tokens [B, N, D] of a batch of features, standing as `layout` says; zero where padded."""
        self.backbone.see(features)
        start = torch.zeros(features.size, len(self.stream_of_patch), dtype=torch.long)
        flat, offset = [self.stream_of_patch.new_zeros(1, self.width, dtype=self.dtype)], 1
        for name, tokenizer in zip(self.stream_names, self.streams.values(), strict=True):
            if name not in features.images:
                continue
            tokens = tokenizer(features.images[name])
            rows = torch.arange(offset, offset + tokens.shape[0] * tokens.shape[1])
            start[features.rows[name], self.patches_of[name]] = rows.view(tokens.shape[:2])
            flat.append(tokens.flatten(0, 1))
            offset += len(rows)
        source = send(start, layout.valid.device).gather(1, layout.patch_index).masked_fill(~layout.valid, 0)
        return torch.cat(flat)[source]

    def encode(
        self, features: Batch, *, saliency: Saliency | None = None, keep_blocks: bool = False, route: Route = "experts"
    ) -> Encoded:
        """Encode a batch of features with nothing hidden.

        Raises:
            ConfigError: saliency is asked for, and the backbone has none.
        """
        if saliency and not self.backbone.has_saliency:
            raise ConfigError("model.backbone: it has no saliency, expected one that has, or masking.policy = random")
        layout = self.layout(features)
        encoded: Encoded = self.backbone(
            self.tokenize(features, layout), layout, saliency=saliency, keep_blocks=keep_blocks, route=route
        )
        return encoded

    def embed(self, batch: Batch, *, route: Route = "experts") -> Tensor:
        """Embedding [B, E] of a batch of images, wherever it lies, pooled as `[features]` says, and whitened if
        the model has a whitening.

        Raises:
            ConfigError: the pooling is not possible with this backbone.
        """
        return self.embed_patches(self.patch_features(batch.to(self.stream_of_patch.device)), route=route)

    def embed_patches(self, patches: Batch, *, route: Route = "experts") -> Tensor:
        """Embedding [B, E] of a batch of patch features. Raises ConfigError as `embed`."""
        pooled = self.pool(self.encode(patches, keep_blocks=self.pooling.reads_blocks, route=route))
        return pooled if self.whitening is None else self.whitening(pooled, self.present(patches).to(pooled.device))

    def pool(self, encoded: Encoded) -> Tensor:
        """Pool encoded tokens to embeddings [B, E] as `[features]` says, unwhitened. Raises ConfigError as `embed`."""
        stream_of_token = self.stream_of_patch[encoded.layout.patch_index]
        return pool(encoded, self.pooling, stream_of_token, len(self.streams))

    def parameter_groups(self) -> dict[str, str]:
        """Sharing group of every tensor in the state dict, by its name."""
        if self._groups.keys() != self.state_dict().keys():
            self._groups = parameter_groups(self)
        return self._groups

    def split_state(self, sharing: SharingConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The state dict in two: parameters that a run shares, and those that stay at the site."""
        return split_state(sharing, self.parameter_groups(), self.state_dict())

    def choose_parts(self, parts: PartsConfig) -> None:
        """Train a part of the parameters; the others get no gradient.

        Of the heads of a model with a task, that of the task alone is trained, whatever the part.
        """
        if parts.kind == "all":
            self.trained = frozenset(dict(self.named_parameters()))
        else:  # a run that trains all of a model does without this module
            from panfm.models.trained_parts import add_lora, trained_names

            add_lora(self.backbone, parts)
            self.trained = trained_names(self, parts)
        if self.task is not None:
            of_encoder = (name for name in self.trained if not name.startswith("heads."))
            self.trained = frozenset([*of_encoder, f"heads.{TASK_HEAD}.weight", f"heads.{TASK_HEAD}.bias"])
        for name, parameter in self.named_parameters():
            if name not in self.trained:
                parameter.requires_grad_(False)

    def travelling_state(self, sharing: SharingConfig) -> dict[str, Tensor]:
        """The shared parameters that are trained: a round's updates, by name."""
        return {name: value for name, value in self.split_state(sharing)[0].items() if name in self.trained}

    def frozen_state(self, sharing: SharingConfig) -> dict[str, Tensor]:
        """The shared parameters that are not trained, by name."""
        return {name: value for name, value in self.split_state(sharing)[0].items() if name not in self.trained}

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parameters."""
        return next(self.parameters()).dtype

    def director_experts(self) -> dict[str, DirectorExperts]:
        """Layers with experts, by the prefix of their parameters' names; none in a dense model."""
        return {name: layer for name, layer in self.named_modules() if isinstance(layer, DirectorExperts)}

    def hidden_queries(self) -> Tensor:
        """One query per patch [M, D]: the stream's own plus the fixed position."""
        pairs = zip(self.heads.stream_heads(), self.streams.values(), strict=True)
        return torch.cat([head.hidden_query + cast(StreamTokenizer, tokenizer).position for head, tokenizer in pairs])


def build_model(run: RunConfig, streams: Sequence[str] | None = None) -> PanModel:
    """Model of a run with all its streams, or only those named (in the run's order).

    Guarantees:
        seeded by name: an initial parameter depends on the run's seed and its own name, so that a site's subset of
            streams starts with the same weights as the whole model.
        experts: a director starts as the dense model's MLP, and its experts as copies of it.

    Raises:
        ConfigError: `model.experts` has not one number per block, or more experts active than there are;
            `train.parts` names more blocks than there are.
    """
    names = [name for name in run.streams if streams is None or name in streams]
    with torch.random.fork_rng(devices=[]):
        streams_of_model = {name: run.streams[name] for name in names}
        model = PanModel(streams_of_model, run.model, run.objective, run.features, run.task)
        model.choose_parts(run.train.parts)
    layers = model.director_experts().values()
    of_experts = {parameter for layer in layers for parameter in layer.experts.parameters()}
    for name, parameter in model.named_parameters():
        if parameter not in of_experts:
            initialise(name, parameter, torch_generator(run.seed, "init", dense_name(name)))
    for layer in layers:
        layer.start_experts()
    return model


def describe_model(run: RunConfig) -> PanModel:
    """Model of a run without memory for its parameters: names, shapes and sharing groups are those of `build_model`."""
    with torch.device("meta"):
        model = PanModel(dict(run.streams), run.model, run.objective, run.features, run.task)
        model.choose_parts(run.train.parts)
        return model


def _angles(streams: Mapping[str, StreamConfig], width: int) -> Tensor:
    """Rotary angles [M, width] of all patches. Raises ConfigError for volumes."""
    if volumes := [name for name, stream in streams.items() if stream.is_volume]:
        raise ConfigError(f'model.positions: "rotary" is for images, {volumes[0]} has volumes')
    return torch.cat([rotary_angles(stream.grid, width) for stream in streams.values()])


def _stream_of_patch(streams: dict[str, StreamConfig]) -> Tensor:
    """Index of the stream of every patch, int64 [M]."""
    sizes = [math.prod(stream.grid) for stream in streams.values()]
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes), output_size=sum(sizes))


def is_tokens(name: str) -> bool:
    """Whether a parameter of two axes holds tokens, one in each row, and is no matrix."""
    return name.endswith((".registers", ".position"))


@torch.no_grad()
def initialise(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Matrices: Xavier normal; biases zero, norms and scales one; CLS, embeddings, queries and other tokens: normal,
    sd 0.02. The second factor of a low-rank addition and the head of a task start at zero."""
    if name.endswith(".lora_b") or name == f"heads.{TASK_HEAD}.weight":
        parameter.zero_()
    elif parameter.dim() > 1 and not is_tokens(name):
        nn.init.xavier_normal_(parameter, generator=generator)
    elif name.endswith(".bias"):
        parameter.zero_()
    elif name.endswith(".weight"):
        parameter.fill_(1.0)
    else:
        parameter.normal_(0.0, 0.02, generator=generator)
