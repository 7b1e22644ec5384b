"""One stream of a model as a plain image encoder, under the names of timm's ViT.

    pixels in [0, 1] -> patch embedding + positions -> CLS, registers, patches -> blocks -> norm -> CLS

The stream's embedding becomes part of the positions, its input constants part of the patch embedding, low-rank
additions part of the weights; a Director-Experts model goes through its directors. Only square pictures that the
tokenizer `patch` reads, with positions that are added, have such a form.

Shape legend: C channels, P patch, T patches, R registers, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from panfm.config import StreamConfig
from panfm.config.model import ModelConfig
from panfm.config.parts import PlainPartsConfig
from panfm.config.start import StartConfig
from panfm.data.store import Batch
from panfm.errors import ConfigError
from panfm.export.final_model import Source
from panfm.export.network import require_equal
from panfm.models import PanModel, build_model
from panfm.models.low_rank import fit_lora
from panfm.models.pan import SIZES, StreamTokenizer
from panfm.models.public_start import dense_state
from panfm.models.public_weights import OUR_LAYERS, read_public
from panfm.models.transfer import director_run, director_state
from panfm.models.vit import VisionTransformer
from panfm.seeds import torch_generator

_WHOLE_NAMES = {"cls": "cls_token", "registers": "reg_token", "norm.weight": "norm.weight", "norm.bias": "norm.bias"}
"""Parameters of the backbone outside of its blocks: our name -> timm's."""
_TIMM_LAYERS = {ours: timm for timm, ours in OUR_LAYERS.items()}


@dataclass(frozen=True)
class PlainVit:
    """An image encoder of one stream."""

    stream: StreamConfig
    model: ModelConfig
    state: Mapping[str, Tensor]
    """float32 parameters by timm's names: `patch_embed.proj.weight` [D, C, P, P], `cls_token` [1, 1, D], `reg_token`
    [1, R, D], `pos_embed` [1, T, D] of the patches alone, `blocks.*`, `norm.*`."""

    @classmethod
    def of(cls, source: Source, name: str, option: str) -> "PlainVit":
        """Read one stream off a run's model.

        Args:
            option: The option that asks for it, for error messages.
        Raises:
            ConfigError: the stream, or the model, has no such form.
        """
        stream, model = source.run.streams[name], source.run.model
        is_square = not stream.is_volume and len(set(stream.shape)) == len(set(stream.patch)) == 1
        for is_fit, given, expected in (
            (is_square, f"{name} of {list(stream.shape)}, patch {list(stream.patch)}", "square pictures and patches"),
            (model.tokenizer == "patch", f'model.tokenizer = "{model.tokenizer}"', '"patch"'),
            (model.positions != "rotary", 'model.positions = "rotary"', '"fixed" or "learned"'),
            (isinstance(source.model.backbone, VisionTransformer), f'model.backbone = "{model.backbone}"', '"dense"'),
        ):
            if not is_fit:
                raise ConfigError(f"{option}: found {given}, expected {expected}")
        return cls(stream, model, _timm_state(source.model, name, stream))

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `timm.create_model`, beside the name of any ViT."""
        width, depth, heads = SIZES[self.model.size]
        return {
            "img_size": list(self.stream.shape),
            "patch_size": list(self.stream.patch),
            "in_chans": self.stream.channels,
            "num_classes": 0,
            "global_pool": "token",
            "class_token": True,
            "no_embed_class": True,
            "reg_tokens": self.model.registers,
            "init_values": 1.0 if self.model.layer_scale else None,
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            "mlp_ratio": float(self.model.hidden_multiple),
        }


def compare_plain(source: Source, name: str, folder: Path) -> float:
    """Read an exported image encoder back as public weights, and encode random images by it and by the run's model.

    Returns:
        The largest difference of CLS and patch tokens.
    Raises:
        RunError: it is above what an export may differ by.
    """
    stream = source.run.streams[name]
    images = torch.rand((2, stream.channels, *stream.shape), generator=torch_generator(0, "export"))
    batch = Batch(2, {name: images}, {name: torch.arange(2)})
    expected, actual = (_encode(model, batch) for model in (source.model, _read_back(source, name, folder)))
    return require_equal(expected, actual)


def _encode(model: PanModel, batch: Batch) -> Tensor:
    with torch.inference_mode():
        encoded = model.encode(model.patch_features(batch), route="director")
        return torch.cat([encoded.cls[:, None], encoded.tokens], dim=1)


def _read_back(source: Source, name: str, folder: Path) -> PanModel:
    """The model of a run that starts from the folder's weights."""
    public, run = read_public(folder), director_run(source.run)
    stream = run.streams[name].model_copy(update=dict.fromkeys(("input_centre", "input_scale", "input_constants")))
    fields = run.model.model_dump(by_alias=True) | public.model_fields()
    run = run.model_copy(
        update={
            "streams": {name: stream},
            "model": ModelConfig.model_validate(fields),
            "train": run.train.model_copy(update={"parts": PlainPartsConfig()}),
            "start": StartConfig(public=True),
        }
    )
    model = build_model(run).eval()
    assert run.start is not None
    model.load_state_dict(model.state_dict() | dense_state(run, public))
    return model


def _timm_state(model: PanModel, name: str, stream: StreamConfig) -> dict[str, Tensor]:
    tokenizer = cast(StreamTokenizer, model.streams[name])
    kernel = tokenizer.project.weight.detach().view(-1, stream.channels, *stream.patch)
    bias = tokenizer.project.bias.detach()
    if stream.input_centre is not None and stream.input_scale is not None:
        centre, scale = (kernel.new_tensor(numbers) for numbers in (stream.input_centre, stream.input_scale))
        kernel = kernel * scale[:, None, None]
        bias = bias - torch.einsum("dchw,c->d", kernel, centre)
    state = {
        "patch_embed.proj.weight": kernel,
        "patch_embed.proj.bias": bias,
        "pos_embed": (tokenizer.position + tokenizer.embedding).detach()[None],
    }
    for ours, value in fit_lora(director_state(model), {}).items():
        if ours.startswith("backbone."):
            timm = _timm_name(ours.removeprefix("backbone."))
            state[timm] = value.view(1, -1, model.width) if timm in ("cls_token", "reg_token") else value
    return {timm: numbers.detach().float().contiguous() for timm, numbers in state.items()}


def _timm_name(name: str) -> str:
    """Name in timm of a parameter of the backbone."""
    if name in _WHOLE_NAMES:
        return _WHOLE_NAMES[name]
    blocks, number, *layer, kind = name.split(".")
    if layer[0] in ("scale1", "scale2"):
        return f"{blocks}.{number}.ls{layer[0][-1]}.gamma"
    return f"{blocks}.{number}.{_TIMM_LAYERS['.'.join(layer)]}.{kind}"
