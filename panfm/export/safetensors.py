"""The weights as the run left them, byte for byte, and the whole metadata: a folder that `panfm embed` reads."""

import shutil
from pathlib import Path

import torch

from panfm.evaluate.embed import load_model
from panfm.export.compare import batch_of, random_inputs, require_equal
from panfm.export.source import Source, write_json
from panfm.files import new_folder


def write_safetensors(source: Source, out: Path) -> float:
    """Write weights, `run.toml` and `metadata.json` into a new folder; returns and raises as `export_run`."""
    with new_folder(out) as folder:
        for name in ("model.safetensors", "run.toml"):
            shutil.copyfile(source.folder / name, folder / name)
        write_json(folder / "metadata.json", source.metadata)
        batch = batch_of(tuple(source.run.streams), random_inputs(source.run.streams))
        with torch.inference_mode():
            return require_equal(source.model.embed(batch), load_model(folder)[0].eval().embed(batch))
