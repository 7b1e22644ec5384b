"""Public ViT weights as they are published, read into the parameter names of our dense ViT.

    timm              state dict (.safetensors, .pth, .bin), or a folder with timm's config.json
    dinov2, dinov3    state dict as published, with or without registers (storage tokens)
    vit, vit-mae      folder of Hugging Face's ViTModel, ViTMAEModel,
    (and both dinos)  Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel: config.json and weights

Files of torch are read with `weights_only=True`. A file's names tell its family; a folder's config.json does. What no
encoder of these families holds is refused; heads, decoders, poolers and mask tokens are left out.

Shape legend: D width, C channels of the kernel (3: RGB), P its patch, T patches of its grid, R registers.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from panfm.config.start import weights_file
from panfm.errors import DataError, reason
from panfm.models.pan import SIZES

Family = Literal["timm", "dinov2", "dinov3", "vit", "vit-mae"]
MeanStd = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: MeanStd = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: MeanStd = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NONE: MeanStd = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
_NORMALISATIONS: dict[Family, MeanStd] = {"dinov2": IMAGENET, "dinov3": IMAGENET, "vit": HALF, "vit-mae": IMAGENET}
"""Of the pixels that a family was trained on. timm has models of both kinds; its config.json tells."""
_EPSILONS: dict[Family, float] = {"timm": 1e-6, "dinov2": 1e-6, "dinov3": 1e-5, "vit": 1e-12, "vit-mae": 1e-12}
_FAMILIES: dict[str, Family] = {
    "vit": "vit",
    "vit_mae": "vit-mae",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "dinov3_vit": "dinov3",
}
"""`model_type` of config.json -> family."""
_WRAPPERS = ("model", "state_dict")
"""Keys under which a published file keeps the state dict."""
_LEFT_OUT = re.compile(
    r"(head|heads|head_dist|classifier|decoder|decoder_\w+|pooler|pre_logits)\..*|mask_token|decoder_pos_embed|"
    r"rope_embed\.periods|.*\.bias_mask"
)
_RENAMES = (
    (r"^(vit|dinov2|dinov2_with_registers|dinov3_vit|backbone)\.", ""),
    (r"^model\.layer\.", "layer."),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "registers"),
    (r"^(register_tokens|reg_token|storage_tokens)$", "registers"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?(?=weight|bias)", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^(encoder\.layer|layer)\.", "blocks."),
    (r"^(blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
    (r"^(blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.attention\.attention\.(query|key|value)\.", r"\1.attn.\2."),
    (r"^(blocks\.\d+)\.attention\.q_proj\.", r"\1.attn.query."),
    (r"^(blocks\.\d+)\.attention\.k_proj\.", r"\1.attn.key."),
    (r"^(blocks\.\d+)\.attention\.v_proj\.", r"\1.attn.value."),
    (r"^(blocks\.\d+)\.attention\.(output\.dense|o_proj)\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.(intermediate\.dense|mlp\.up_proj)\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.(output\.dense|mlp\.down_proj)\.", r"\1.mlp.fc2."),
    (r"^(blocks\.\d+)\.layer_scale([12])\.lambda1$", r"\1.ls\2.gamma"),
)
"""In this order: names of `transformers` -> those of timm and DINOv2."""
OUR_LAYERS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
"""Layer of a block in timm and DINOv2 -> in `panfm.models.vit`."""
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias|gamma)")


@dataclass(frozen=True)
class PublicWeights:
    """An encoder of public weights, in our names."""

    family: Family
    sha256: str
    """Of the weights file."""
    backbone: Mapping[str, Tensor]
    """Parameters of the dense ViT, `backbone.` included, float32; its CLS holds CLS's position too."""
    kernel: Tensor
    """[D, C, P, P] of the patch embedding."""
    bias: Tensor
    """[D]"""
    positions: Tensor | None
    """[T, D] of the patches, row-major over a square grid; None where attention rotates instead."""
    heads: int | None
    """Of attention, where config.json tells."""
    epsilon: float
    """Of the layer norms."""
    normalisation: MeanStd | None
    """Mean and deviation that pixels in [0, 1] are standardised by; None where nothing tells."""

    @property
    def width(self) -> int:
        """Width of the encoder."""
        return len(self.bias)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(name.endswith(".norm1.weight") for name in self.backbone)

    @property
    def antialias(self) -> bool:
        """Whether the family's own code filters positions when it interpolates them."""
        return self.family == "timm" or (self.family == "dinov2" and "backbone.registers" in self.backbone)

    def model_fields(self) -> dict[str, Any]:
        """Fields of `[model]` that these weights fit, by their TOML keys.

        Raises:
            DataError: no size of ours has this width, depth and number of heads.
        """
        shape = (self.width, self.depth)
        size = next((name for name, (*fits, _) in SIZES.items() if tuple(fits) == shape), None)
        if size is None or self.heads not in (None, SIZES[size][2]):
            sizes = ", ".join(f"{name} {' x '.join(map(str, dims))}" for name, dims in SIZES.items())
            given = " x ".join(str(number) for number in (*shape, self.heads) if number)
            raise DataError(f"start.model: an encoder of {given}, expected width x depth x heads of {sizes}")
        registers = self.backbone.get("backbone.registers")
        return {
            "size": size,
            "tokenizer": "patch",
            "hidden-multiple": len(self.backbone["backbone.blocks.0.mlp.0.bias"]) // self.width,
            "positions": "rotary" if self.positions is None else "learned",
            "registers": 0 if registers is None else len(registers),
            "layer-scale": "backbone.blocks.0.scale1.weight" in self.backbone,
            "norm-epsilon": self.epsilon,
        }


def read_public(path: Path) -> PublicWeights:
    """Read a weights file, or a folder with config.json and a weights file.

    Raises:
        DataError: it cannot be read, or is no encoder of a known family.
    """
    file = weights_file(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"start.model: {file} cannot be read ({error.strerror})") from error
    config = _read_json(path / "config.json") if path.is_dir() else {}
    tensors, digest = _tensors(file, content), hashlib.sha256(content).hexdigest()
    try:
        state = _canonical(tensors)
        family = _family(config, state)
        return _converted(family, state, config, _normalisation(path, family, config), digest)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"start.model: {path} is no encoder of a ViT as its family publishes it ({reason})") from error


def _tensors(file: Path, content: bytes) -> dict[str, Tensor]:
    """Tensors of a weights file by name; of torch's files without running code from them."""
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load(content)
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # both raise all kinds for a file that is none of theirs
        if not isinstance(error, SafetensorError | RuntimeError | ValueError | OSError | EOFError | KeyError):
            error = ValueError(type(error).__name__)
        raise DataError(f"start.model: {file} is no weights file of safetensors or torch") from error
    for key in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise DataError(f"start.model: {file} holds no state dict, expected tensors by name")
    return loaded


def _canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors under timm's and DINOv2's names, query, key and value as one."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        new = name
        for pattern, replacement in _RENAMES:
            new = re.sub(pattern, replacement, new)
        if new.endswith(".attn.qkv.bias") and (mask := state.get(f"{name}_mask")) is not None:
            value = torch.where(mask == 0, torch.zeros_like(value), value)  # keys of DINOv3 have no bias
        if not _LEFT_OUT.fullmatch(new):
            renamed[new] = value
    for query in [name for name in renamed if name.endswith(".attn.query.weight")]:
        layer = query.removesuffix("query.weight")
        weights = [renamed.pop(f"{layer}{part}.weight") for part in ("query", "key", "value")]
        biases = [
            renamed.pop(f"{layer}{part}.bias", torch.zeros(len(weights[0]))) for part in ("query", "key", "value")
        ]
        renamed |= {f"{layer}qkv.weight": torch.cat(weights), f"{layer}qkv.bias": torch.cat(biases)}
    for weight in [name for name in renamed if name.endswith(".attn.qkv.weight")]:
        renamed.setdefault(f"{weight.removesuffix('weight')}bias", torch.zeros(len(renamed[weight])))
    return renamed


def _family(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Family:
    kind = config.get("model_type")
    if kind is not None:
        if kind not in _FAMILIES:
            raise DataError(f"start.model: model_type {kind!r:.40} in config.json, expected {', '.join(_FAMILIES)}")
        return _FAMILIES[kind]
    if "architecture" in config:
        return "timm"
    if "blocks.0.ls1.gamma" not in state:
        return "timm"
    return "dinov2" if "pos_embed" in state else "dinov3"


def _normalisation(path: Path, family: Family, config: Mapping[str, Any]) -> MeanStd | None:
    """Mean and deviation of the pixels: as the folder tells, else as the family has them."""
    told = config.get("pretrained_cfg", {})
    mean, std = told.get("mean"), told.get("std")
    if path.is_dir() and (path / "preprocessor_config.json").exists():
        told = _read_json(path / "preprocessor_config.json")
        mean, std = told.get("image_mean"), told.get("image_std")
    if mean is None or std is None:
        return _NORMALISATIONS.get(family)
    return tuple(map(float, mean)), tuple(map(float, std))


def _converted(
    family: Family, state: Mapping[str, Tensor], config: Mapping[str, Any], normalisation: MeanStd | None, sha256: str
) -> PublicWeights:
    left = {name: value.float() for name, value in state.items()}
    try:
        kernel, cls = left.pop("patch_embed.proj.weight"), left.pop("cls_token").reshape(-1)
        bias = left.pop("patch_embed.proj.bias", torch.zeros(len(kernel)))
        backbone = {f"backbone.norm.{kind}": left.pop(f"norm.{kind}") for kind in ("weight", "bias")}
    except KeyError as error:
        raise DataError(f"start.model: holds no {error.args[0]}, expected the encoder of a ViT") from error
    positions, of_cls = _split_positions(left.pop("pos_embed", None))
    backbone["backbone.cls"] = cls + of_cls if of_cls is not None else cls
    registers = left.pop("registers", torch.zeros(1, 0, len(cls)))
    if registers.numel():
        backbone["backbone.registers"] = registers.reshape(-1, len(cls))
    for name, value in left.items():
        backbone[_our_name(name)] = value
    heads, epsilon = config.get("num_attention_heads"), float(config.get("layer_norm_eps", _EPSILONS[family]))
    return PublicWeights(family, sha256, backbone, kernel, bias, positions, heads, epsilon, normalisation)


def _split_positions(table: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Positions of the patches [T, D] and that of CLS [D], if the table [1, T or T + 1, D] has one."""
    if table is None:
        return None, None
    table = table.reshape(-1, table.shape[-1])
    side = int(len(table) ** 0.5)
    if side * side == len(table):
        return table, None
    if side * side == len(table) - 1:
        return table[1:], table[0]
    raise DataError(f"start.model: {len(table)} positions, expected those of a square grid and CLS")


def _our_name(name: str) -> str:
    """Our name of a block's parameter. Raises DataError for another's."""
    block = _BLOCK.fullmatch(name)
    number, layer, kind = block.groups() if block else ("", "", "")
    if kind == "gamma" and layer in ("ls1", "ls2"):
        return f"backbone.blocks.{number}.scale{layer[-1]}.weight"
    if layer not in OUR_LAYERS or kind == "gamma":
        raise DataError(f"start.model: holds {name:.80}, which no ViT of a known family has")
    return f"backbone.blocks.{number}.{OUR_LAYERS[layer]}.{kind}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"start.model: {path} cannot be read as JSON ({reason(error)})") from error
    if not isinstance(read, dict):
        raise DataError(f"start.model: {path} holds no JSON object")
    return read
