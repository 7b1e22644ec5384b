"""The formats of an export: from the folder of a run to a file or folder that is read back and compared.

`dense-vit` is a run of this library with a dense backbone: the model itself if it is dense, else the route through its
directors. `panfm embed` reads it, as it does `safetensors`; onnx.py, monai_bundle.py, timm_folder.py and
hugging_face.py have the formats of others.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from panfm.config import dump_toml
from panfm.errors import ConfigError
from panfm.evaluate.embed import load_model
from panfm.export.final_model import Source
from panfm.export.hugging_face import write_hugging_face
from panfm.export.monai_bundle import write_monai_bundle
from panfm.export.network import batch_of, random_inputs, require_equal
from panfm.export.onnx import write_onnx
from panfm.export.timm_folder import write_timm
from panfm.models.transfer import director_run, director_state
from panfm.models.whitening import FILE as WHITENING
from panfm.outputs import new_folder, write_json


def write_safetensors(source: Source, out: Path, _streams: tuple[str, ...] = ()) -> float:
    """Write weights, `run.toml` and `metadata.json` into a new folder; returns and raises as `export_run`."""
    with new_folder(out) as folder:
        return source.copy_to(folder)


def write_dense_vit(source: Source, out: Path, _streams: tuple[str, ...] = ()) -> float:
    """Write weights, `run.toml` and `metadata.json` into a new folder; returns and raises as `export_run`."""
    if source.model.whitening and source.model.director_experts():
        raise ConfigError(
            "--to dense-vit: the whitening is of embeddings by way of the experts, expected a model without"
        )
    with new_folder(out) as folder:
        if source.model.whitening:
            shutil.copyfile(source.folder / WHITENING, folder / WHITENING)
        state = {name: value.contiguous() for name, value in director_state(source.model).items()}
        save_file(state, folder / "model.safetensors")
        (folder / "run.toml").write_text(dump_toml(director_run(source.run)), encoding="utf-8")
        write_json(folder / "metadata.json", source.metadata | {"experts": "none"}, indent=2)
        batch = batch_of(tuple(source.run.streams), random_inputs(source.run.streams))
        with torch.inference_mode():
            expected = source.model.embed(batch, route="director")
            return require_equal(expected, load_model(folder)[0].eval().embed(batch))


@dataclass(frozen=True)
class Format:
    """A format of an export."""

    write: Callable[[Source, Path, tuple[str, ...]], float]
    streams: Literal["all", "some", "one", "all or one"]
    """Streams that an export holds: all of the model's; those named (all when none is); or one that is named."""


_FORMATS: Mapping[str, Format] = {
    "safetensors": Format(write_safetensors, "all"),
    "dense-vit": Format(write_dense_vit, "all"),
    "monai-bundle": Format(write_monai_bundle, "some"),
    "onnx": Format(write_onnx, "some"),
    "timm": Format(write_timm, "one"),
    "huggingface": Format(write_hugging_face, "all or one"),
}
FORMATS = tuple(_FORMATS)


def export_run(
    run_folder: Path, to: str, out: Path, *, streams: Sequence[str] = (), licence: str | None = None
) -> float:
    """Export the final model of a run.

    Guarantees:
        whole: `out` appears with all its content, or not at all; nothing is overwritten.
        equal: what was written was read back, and embeds random images as the run's model does.
    Args:
        to: One of FORMATS.
        out: New folder; new file for onnx.
        streams: Of `monai-bundle` and `onnx`: those that can be fed, in the order of the inputs; all when empty. Of
            `timm` and `huggingface`: the one whose image encoder is wanted; the whole model when empty (huggingface).
        licence: Of the weights.
    Returns:
        The largest difference between the embeddings of the export and of the run's model.
    Raises:
        ConfigError: an argument does not hold, or packages are missing.
        DataError: the run folder does not hold, or `out` exists or cannot be written.
        RunError: the export differs from the model.
    """
    if to not in _FORMATS:
        raise ConfigError(f"--to: found {to!r}, expected one of {', '.join(FORMATS)}")
    chosen = _FORMATS[to]
    if streams and chosen.streams == "all":
        raise ConfigError(f"--streams: goes with {_takers('some')}, one of them with {_takers('one')}; not with {to}")
    if "one" in chosen.streams and len(streams) != 1 and (streams or chosen.streams == "one"):
        raise ConfigError(f"--streams: found {len(streams)}, expected one stream for {to}")
    source = Source.read(run_folder, licence)
    return chosen.write(source, out, source.choose(streams) if streams or chosen.streams == "some" else ())


def _takers(streams: str) -> str:
    """Formats that take such streams, as words."""
    return " and ".join(name for name, known in _FORMATS.items() if streams in known.streams)
