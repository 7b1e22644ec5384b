"""Hugging Face: a folder with `config.json`, `model.safetensors` and a model card, which loads without any network.

    without --streams     the whole model, in our names: `panfm.load(FOLDER)`
    with one stream       that stream's image encoder as DINOv2 has it: `transformers.AutoModel.from_pretrained(FOLDER)`

DINOv2's model is ViT's with layer scales, and has registers where the run has some. Weights and images are those of the
export `timm`; images are resized and divided by 255, no more.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from panfm.export.final_model import Source
from panfm.export.model_card import model_card
from panfm.export.plain_vit import PlainVit, compare_plain
from panfm.export.timm_folder import plain_metadata
from panfm.outputs import new_folder, write_json

_RENAMES = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"^blocks\.(\d+)\.attn\.(query|key|value)\.", r"encoder.layer.\1.attention.attention.\2."),
    (r"^blocks\.(\d+)\.ls([12])\.gamma$", r"encoder.layer.\1.layer_scale\2.lambda1"),
    (r"^blocks\.", "encoder.layer."),
)
"""In this order: names of timm -> those of `transformers`."""


def write_hugging_face(source: Source, out: Path, streams: tuple[str, ...]) -> float:
    """Write one new folder; returns and raises as `export_run`."""
    return _write_encoder(source, out, *streams) if streams else _write_whole(source, out)


def _write_whole(source: Source, out: Path) -> float:
    config = {"model_type": "panfm", "architectures": ["PanModel"], "hidden_size": source.model.width}
    with new_folder(out) as folder:
        write_json(folder / "config.json", config | {"streams": source.metadata["streams"]}, indent=2)
        (folder / "README.md").write_text(model_card(source, source.metadata, "panfm"), encoding="utf-8")
        return source.copy_to(folder)


def _write_encoder(source: Source, out: Path, stream: str) -> float:
    vit = PlainVit.of(source, stream, "--to huggingface")
    metadata = plain_metadata(source, stream)
    with new_folder(out) as folder:
        save_file(_transformers_state(vit), folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", _config(vit), indent=2)
        write_json(folder / "preprocessor_config.json", _preprocessing(vit), indent=2)
        write_json(folder / "metadata.json", metadata, indent=2)
        (folder / "README.md").write_text(model_card(source, metadata, "transformers"), encoding="utf-8")
        return compare_plain(source, stream, folder)


def _transformers_state(vit: PlainVit) -> dict[str, Tensor]:
    """Parameters by the names of `Dinov2Model`; what our model lacks changes nothing there."""
    width = len(vit.state["norm.weight"])
    state = {"embeddings.mask_token": torch.zeros(1, width)}
    if not vit.model.layer_scale:
        for number in range(vit.arguments["depth"]):
            state |= {f"encoder.layer.{number}.layer_scale{part}.lambda1": torch.ones(width) for part in (1, 2)}
    for name, value in vit.state.items():
        if ".qkv." in name:
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            state |= {_renamed(name.replace(".qkv.", f".{part}.")): third.contiguous() for part, third in parts}
        elif name == "pos_embed":
            state[_renamed(name)] = torch.cat([torch.zeros(1, 1, width), value], dim=1)
        else:
            state[_renamed(name)] = value
    return state


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _config(vit: PlainVit) -> dict[str, Any]:
    """The configuration of `Dinov2Model`, or of `Dinov2WithRegistersModel`."""
    registers, arguments = vit.model.registers, vit.arguments
    config: dict[str, Any] = {
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "hidden_size": arguments["embed_dim"],
        "num_hidden_layers": arguments["depth"],
        "num_attention_heads": arguments["num_heads"],
        "mlp_ratio": vit.model.hidden_multiple,
        "hidden_act": "gelu",
        "layer_norm_eps": vit.model.norm_epsilon,
        "image_size": vit.stream.shape[0],
        "patch_size": vit.stream.patch[0],
        "num_channels": vit.stream.channels,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
    }
    return config | ({"num_register_tokens": registers} if registers else {})


def _preprocessing(vit: PlainVit) -> dict[str, Any]:
    height, width = vit.stream.shape
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.0] * vit.stream.channels,
        "image_std": [1.0] * vit.stream.channels,
    }
