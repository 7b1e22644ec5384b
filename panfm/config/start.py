"""The model that a run starts from."""

import hashlib
import json
from typing import Annotated

from pydantic import Field

from panfm.config.base import Uncoupled


class StartConfig(Uncoupled):
    """Start from a trained model (warm start) instead of parameters drawn by `seed`; e.g. one pre-trained on public
    data, of which a private run then trains a part (`patient-dp.trained`). It holds what the run shares, no more and no
    less; what is private to a site starts as ever, private experts as copies of the director. A
    Director-Experts run may start from a dense model of its size: directors and experts are copies of its MLPs."""

    model: Annotated[str | None, Field(min_length=1)] = None
    """Folder of the model, `<run folder>/model`, on the machine of the server; sites are not told."""
    sha256: Annotated[str | None, Field(pattern=r"^[0-9a-f]{64}$")] = None
    """Of its model.safetensors. Filled in when the description is read; another file is then refused."""
    parameters: Annotated[dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] | None, Field(min_length=1)] = (
        None
    )
    """Shared group -> SHA-256 of its float32 parameters in the order of their names, by which sites know the globals of
    round 1. Filled in when the run folder is made; other parameters are then refused."""


def start_hash(start: StartConfig) -> str:
    """SHA-256 over the hashes of all groups that a run starts from; round 1 must start at them."""
    return hashlib.sha256(json.dumps(sorted((start.parameters or {}).items())).encode()).hexdigest()
