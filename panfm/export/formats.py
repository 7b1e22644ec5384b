"""The formats of an export: from the folder of a run to a file or folder that is read back and compared.

`dense-vit` is a run of this library with a dense backbone: the model itself if it is dense, else the route through its
directors. `panfm embed` reads it, as it does `safetensors`; onnx.py and monai_bundle.py have the formats of others.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from panfm.config import dump_toml
from panfm.errors import ConfigError
from panfm.evaluate.embed import load_model
from panfm.export.final_model import Source
from panfm.export.monai_bundle import write_monai_bundle
from panfm.export.network import batch_of, random_inputs, require_equal
from panfm.export.onnx import write_onnx
from panfm.files import new_folder, write_json
from panfm.models.transfer import director_run, director_state
from panfm.models.whitening import FILE as WHITENING


def write_safetensors(source: Source, out: Path) -> float:
    """Write weights, `run.toml` and `metadata.json` into a new folder; returns and raises as `export_run`."""
    with new_folder(out) as folder:
        for name in ("model.safetensors", "run.toml", *_whitening(source)):
            shutil.copyfile(source.folder / name, folder / name)
        write_json(folder / "metadata.json", source.metadata, indent=2)
        batch = batch_of(tuple(source.run.streams), random_inputs(source.run.streams))
        with torch.inference_mode():
            return require_equal(source.model.embed(batch), load_model(folder)[0].eval().embed(batch))


def write_dense_vit(source: Source, out: Path) -> float:
    """Write weights, `run.toml` and `metadata.json` into a new folder; returns and raises as `export_run`."""
    if source.model.whitening and source.model.director_experts():
        raise ConfigError(
            "--to dense-vit: the whitening is of embeddings by way of the experts, expected a model without"
        )
    with new_folder(out) as folder:
        for name in _whitening(source):
            shutil.copyfile(source.folder / name, folder / name)
        state = {name: value.contiguous() for name, value in director_state(source.model).items()}
        save_file(state, folder / "model.safetensors")
        (folder / "run.toml").write_text(dump_toml(director_run(source.run)), encoding="utf-8")
        write_json(folder / "metadata.json", source.metadata | {"experts": "none"}, indent=2)
        batch = batch_of(tuple(source.run.streams), random_inputs(source.run.streams))
        with torch.inference_mode():
            expected = source.model.embed(batch, route="director")
            return require_equal(expected, load_model(folder)[0].eval().embed(batch))


def _whitening(source: Source) -> tuple[str, ...]:
    return (WHITENING,) if source.model.whitening else ()


_WHOLE: Mapping[str, Callable[[Source, Path], float]] = {
    "safetensors": write_safetensors,
    "dense-vit": write_dense_vit,
}
_BY_STREAM: Mapping[str, Callable[[Source, Path, tuple[str, ...]], float]] = {
    "monai-bundle": write_monai_bundle,
    "onnx": write_onnx,
}
FORMATS = (*_WHOLE, *_BY_STREAM)


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
        streams: Of `monai-bundle` and `onnx`: those that can be fed, in the order of the inputs; all when empty.
        licence: Of the weights.
    Returns:
        The largest difference between the embeddings of the export and of the run's model.
    Raises:
        ConfigError: an argument does not hold, or packages are missing.
        DataError: the run folder does not hold, or `out` exists or cannot be written.
        RunError: the export differs from the model.
    """
    if to in _WHOLE:
        if streams:
            raise ConfigError(f"--streams: goes with {' and '.join(_BY_STREAM)}; {to} always holds all streams")
        return _WHOLE[to](Source.read(run_folder, licence), out)
    if to not in _BY_STREAM:
        raise ConfigError(f"--to: found {to!r}, expected one of {', '.join(FORMATS)}")
    source = Source.read(run_folder, licence)
    return _BY_STREAM[to](source, out, source.choose(streams))
