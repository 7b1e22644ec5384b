"""timm: weights under timm's names and the configuration of the model, for one stream of pictures.

    timm.create_model("local-dir:FOLDER", pretrained=True)                      or
    timm.create_model("vit_base_patch16_224", **arguments).load_state_dict(load_file("model.safetensors"))

`arguments` stand in metadata.json. The folder may also be the public start of another run (`start.model`).
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from panfm.export.final_model import Source
from panfm.export.plain_vit import PlainVit, compare_plain
from panfm.outputs import new_folder, write_json

_ARCHITECTURE = "vit_base_patch16_224"
"""Any ViT of timm: the arguments say all that differs."""


def write_timm(source: Source, out: Path, streams: tuple[str, ...]) -> float:
    """Write weights, `config.json` and `metadata.json` into a new folder; returns and raises as `export_run`."""
    [stream] = streams
    vit = PlainVit.of(source, stream, "--to timm")
    with new_folder(out) as folder:
        save_file(dict(vit.state), folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", _config(vit), indent=2)
        arguments = {"architecture": _ARCHITECTURE, "arguments": vit.arguments}
        write_json(folder / "metadata.json", plain_metadata(source, stream) | {"timm": arguments}, indent=2)
        return compare_plain(source, stream, folder)


def plain_metadata(source: Source, stream: str) -> dict[str, Any]:
    """Metadata of an export that is the image encoder of one stream."""
    width = source.model.width
    return source.metadata_of([stream]) | {"pooling": "cls", "whitening": None, "embedding": width, "experts": "none"}


def _config(vit: PlainVit) -> dict[str, Any]:
    channels = vit.stream.channels
    return {
        "architecture": _ARCHITECTURE,
        "num_classes": 0,
        "num_features": vit.arguments["embed_dim"],
        "global_pool": "token",
        "model_args": vit.arguments,
        "pretrained_cfg": {
            "input_size": [channels, *vit.stream.shape],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": [0.0] * channels,
            "std": [1.0] * channels,
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
        },
    }
