"""The model that a run starts from."""

from typing import Annotated

from pydantic import Field

from panfm.config._base import Uncoupled


class StartConfig(Uncoupled):
    """Start from a trained model (warm start) instead of parameters drawn by `seed`; e.g. one pre-trained on public
    data, of which a private run then trains a part (`privacy.trained`). It holds what the run shares, no more and no
    less; what is private to a site starts as ever, private experts as copies of the director. A
    Director-Experts run may start from a dense model of its size: directors and experts are copies of its MLPs."""

    model: Annotated[str | None, Field(min_length=1)] = None
    """Folder of the model, `<run folder>/model`, on the machine of the server; sites are not told."""
    sha256: Annotated[str | None, Field(pattern=r"^[0-9a-f]{64}$")] = None
    """Of its model.safetensors. Filled in when the description is read; another file is then refused."""
