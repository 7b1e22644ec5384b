"""The model as a plain dense ViT: itself if it is dense, else the route through its directors.

The folder holds a run of this library with a dense backbone, so `panfm embed` reads it, and the state dict loads
strictly into such a model.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from panfm.config import dump_toml
from panfm.evaluate.embed import load_model
from panfm.export.compare import batch_of, random_inputs, require_equal
from panfm.export.source import Source, write_json
from panfm.files import new_folder
from panfm.models.transfer import director_run, director_state


def write_dense_vit(source: Source, out: Path) -> float:
    """Write weights, `run.toml` and `metadata.json` into a new folder; returns and raises as `export_run`."""
    with new_folder(out) as folder:
        state = {name: value.contiguous() for name, value in director_state(source.model).items()}
        save_file(state, folder / "model.safetensors")
        (folder / "run.toml").write_text(dump_toml(director_run(source.run)), encoding="utf-8")
        write_json(folder / "metadata.json", source.metadata | {"experts": "none"})
        batch = batch_of(tuple(source.run.streams), random_inputs(source.run.streams))
        with torch.inference_mode():
            expected = source.model.embed(batch, route="director")
            return require_equal(expected, load_model(folder)[0].eval().embed(batch))
