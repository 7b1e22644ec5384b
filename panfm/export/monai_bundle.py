"""A MONAI bundle: https://docs.monai.io/en/stable/mb_specification.html

    configs/metadata.json   MONAI's keys; ours stand under `panfm`
    configs/inference.json  network, reading of scans, `run`: embeddings of a list of patients
    configs/run.toml        the run, which says how scans are read
    models/model.pt2        the graph with its weights (torch.export)
    models/model.pt         the network's state dict, which MONAI's own loaders expect
    scripts/network.py      loads the graph
    docs/README.md, LICENSE

The network needs torch and MONAI only. Reading scans needs panfm: a second reader beside ours would drift from what the
model was trained on, and nobody would notice.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from panfm import __version__
from panfm.anatomy import Modality, parse_stream
from panfm.config import StreamConfig, load_run
from panfm.data.read import read_image
from panfm.export import monai_network
from panfm.export.final_model import Source, sizes_text
from panfm.export.network import EmbeddingNetwork, batch_of, random_inputs, require_equal, trace
from panfm.outputs import new_folder, write_json

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
"""What `verify_metadata` checks against."""
MONAI_VERSION = "1.6.1"
"""The one that tests load bundles with. Writing a bundle needs none."""
_MODEL_VERSION = "1.0.0"


class ReadStreams:
    """Images of one patient, as the run's sites read them: what a bundle's `preprocessing` does."""

    def __init__(self, run: str, streams: Sequence[str]) -> None:
        """Take the description of a run, and the streams in the network's order."""
        description = load_run(Path(run))
        self._streams = {name: description.streams[name] for name in streams}

    def __call__(self, paths: Mapping[str, str]) -> dict[str, Tensor]:
        """Read one patient's files.

        Args:
            paths: Stream -> image file; streams that the patient lacks, and other keys, may be there or not.
        Returns:
            Stream -> float32 [C, *shape] in [0, 1], zeros where absent, and `present`, bool [streams].
        Raises:
            DataError: as `panfm.data.read.read_image`.
        """
        images = {
            name: torch.from_numpy(read_image(Path(paths[name]), name, config))
            if name in paths
            else torch.zeros(config.channels, *config.shape)
            for name, config in self._streams.items()
        }
        return {**images, "present": torch.tensor([name in paths for name in self._streams])}


def write_monai_bundle(source: Source, out: Path, streams: tuple[str, ...]) -> float:
    """Write a new folder; returns and raises as `export_run`."""
    network = EmbeddingNetwork(source.model, streams)
    with new_folder(out) as folder:
        for name in ("configs", "models", "scripts", "docs"):
            (folder / name).mkdir()
        torch.export.save(trace(network), folder / "models" / "model.pt2")
        shutil.copyfile(monai_network.__file__, folder / "scripts" / "network.py")
        (folder / "scripts" / "__init__.py").touch()
        shutil.copyfile(source.folder / "run.toml", folder / "configs" / "run.toml")
        metadata = source.metadata_of(streams)
        write_json(folder / "configs" / "metadata.json", _metadata(metadata, network), indent=2)
        write_json(folder / "configs" / "inference.json", _inference(network), indent=2)
        (folder / "docs" / "README.md").write_text(_readme(metadata), encoding="utf-8")
        (folder / "LICENSE").write_text(_LICENCE.format(**metadata), encoding="utf-8")
        loaded = monai_network.Embedder(str(folder / "models" / "model.pt2"), _shapes(network))
        torch.save(loaded.state_dict(), folder / "models" / "model.pt")
        inputs = random_inputs(network.configs)
        with torch.inference_mode():
            embedding = loaded(**dict(zip((*streams, "present"), inputs, strict=True)))
            return require_equal(source.model.embed(batch_of(streams, inputs)), embedding)


def _shapes(network: EmbeddingNetwork) -> dict[str, list[int]]:
    return {name: [config.channels, *config.shape] for name, config in network.configs.items()}


def _metadata(metadata: Mapping[str, Any], network: EmbeddingNetwork) -> dict[str, Any]:
    streams = list(network.configs)
    first, *others = [_image(name, network.configs[name]) for name in streams]
    return {
        "schema": SCHEMA,
        "version": _MODEL_VERSION,
        "changelog": {_MODEL_VERSION: f"run {metadata['run-id']} after {metadata['rounds']} rounds"},
        "monai_version": MONAI_VERSION,
        "pytorch_version": torch.__version__,
        "numpy_version": np.__version__,
        "required_packages_version": {"panfm": __version__},
        "name": metadata["name"],
        "task": "One embedding of a patient from whichever organs' images there are",
        "description": _DESCRIPTION.format(first=streams[0], **metadata),
        "authors": f"Sites of the federation: {', '.join(metadata['sites'])}",
        "copyright": f"Licence of the weights: {metadata['licence']}",
        "intended_use": metadata["intended-use"],
        "network_data_format": {
            "inputs": {
                "image": first,
                **dict(zip(streams[1:], others, strict=True)),
                "present": _tensor("flags", "bool", len(streams), [], [0, 1]),
            },
            "outputs": {"pred": _tensor("latent", "float32", metadata["embedding"], [], [])},
        },
        "panfm": metadata,
    }


def _image(stream: str, config: StreamConfig) -> dict[str, Any]:
    modality = parse_stream(stream)[1]
    table = _tensor("magnitude", "float32", config.channels, list(config.shape), [0, 1])
    return table | {
        "type": "image",
        "modality": str(modality).upper() if modality in (Modality.MR, Modality.CT) else str(modality),
        "is_patch_data": False,
        "channel_def": {str(channel): stream for channel in range(config.channels)},
    }


def _tensor(kind: str, dtype: str, channels: int, shape: list[int], value_range: list[int]) -> dict[str, Any]:
    return {
        "type": "tuples",
        "format": kind,
        "num_channels": channels,
        "spatial_shape": shape,
        "dtype": dtype,
        "value_range": value_range,
    }


def _inference(network: EmbeddingNetwork) -> dict[str, Any]:
    return {
        "imports": ["$import json", "$import pathlib", "$import numpy", "$from scripts.network import embed"],
        "bundle_root": ".",
        "datalist": "patients.json",
        "output": "embeddings.npy",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": "scripts.network.Embedder",
            "graph": "$@bundle_root + '/models/model.pt2'",
            "shapes": _shapes(network),
        },
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "panfm.export.monai_bundle.ReadStreams",
            "run": "$@bundle_root + '/configs/run.toml'",
            "streams": list(network.configs),
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$json.loads(pathlib.Path(@datalist).read_text())",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 8},
        "run": ["$numpy.save(@output, embed(@network, @dataloader, @device))"],
    }


def _readme(metadata: Mapping[str, Any]) -> str:
    rows = [
        f"| `{name}` | {row['channels']} | {sizes_text(row['shape'])} | {sizes_text(row['spacing-mm'])} | "
        f"{row['axes']} | {row['intensity']} |"
        for name, row in metadata["streams"].items()
    ]
    return _README.format(table="\n".join(rows), first=next(iter(metadata["streams"])), **metadata)


_DESCRIPTION = (
    "Pan-organ model, pre-trained by a federation in {rounds} rounds without labels. `image` is {first}; the others"
    " go by the names of their streams, any may be left out, and `present` says who has what."
)
_LICENCE = """\
Weights (models/): {licence}

Code (scripts/network.py, configs/): part of panfm {panfm}, Apache License 2.0, http://www.apache.org/licenses/LICENSE-2.0
"""
_README = """\
# {name}

One embedding of {embedding} numbers per patient, from any of these images:

| stream | channels | voxels | spacing in mm | axes | intensity |
|---|---|---|---|---|---|
{table}

Intended use: {intended-use}. Privacy: {epsilon}. Experts: {experts}.
Trained over {rounds} rounds, run `{run-id}`. Licence of the weights: {licence}.

## The network alone: torch and MONAI, no panfm

In this folder:

    from monai.bundle import ConfigParser
    parser = ConfigParser()
    parser.read_config("configs/inference.json")
    network = parser.get_parsed_content("network_def").eval()
    embedding = network(image)                  # {first}, float32 [B, C, *voxels], prepared as the table says
    embedding = network(**{{"{first}": image}})   # the same; further streams by their names

    python -m monai.bundle verify_metadata --meta_file configs/metadata.json --filepath schema.json
    python -m monai.bundle verify_net_in_out network --meta_file configs/metadata.json \\
      --config_file configs/inference.json

`model.pt2` was written by torch {torch}; another version may refuse it.

## From scans: needs panfm {panfm}

`patients.json` is a list with one object per patient, stream to file: `[{{"{first}": "scan.nii.gz"}}]`.

    python -m monai.bundle run --meta_file configs/metadata.json --config_file configs/inference.json

writes `embeddings.npy`, one row per patient. Scans are resampled and scaled by the code that the sites trained with.
"""
