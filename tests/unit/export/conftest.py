"""Run folders as a finished run leaves them, as far as an export reads them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from panfm.config import RunConfig, dump_toml
from panfm.models import build_model
from panfm.models.whitening import Whitening, save_whitening

METADATA = {
    "name": "small",
    "run-id": "small-1",
    "rounds": 2,
    "sites": ["one", "two"],
    "intended-use": "research; not a medical device",
}


@pytest.fixture
def write_run(tmp_path) -> Callable[..., Path]:
    """Writes a run folder, with a whitening if one is given; experts that are shared differ from one another and from
    the director."""

    def write(run: RunConfig, whitening: Whitening | None = None) -> Path:
        model, generator = build_model(run), torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = 0.2 if ".mlp." in name else 0.02
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        shared, _ = model.split_state(run.sharing)
        folder = tmp_path / "run" / "model"
        folder.mkdir(parents=True)
        save_file(dict(shared), folder / "model.safetensors")
        (folder / "run.toml").write_text(dump_toml(run))
        (folder / "metadata.json").write_text(json.dumps(METADATA))
        if whitening:
            save_whitening(folder, whitening, run.features.pooling_text)
        return folder.parent

    return write
