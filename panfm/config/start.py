"""The model that a run starts from."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from panfm.config.base import Uncoupled


class StartConfig(Uncoupled):
    """Start from a trained model (warm start) instead of parameters drawn by `seed`, and train all of it or a part
    (`train.parts`). An own model holds what the run shares, no more and no less; public weights hold the encoder: the
    rest of what is shared is as the seed has it, and streams' embeddings are zero. What is private to a site starts as
    ever, private experts as copies of the director. A Director-Experts run may start from a dense model of its size:
    directors and experts are copies of its MLPs."""

    model: Annotated[str | None, Field(min_length=1)] = None
    """On the machine of the server; sites are not told. A run folder, or the folder of its model; or public ViT
    weights: a file (.safetensors, .pth, .bin: timm, DINOv2, DINOv3) or a folder of Hugging Face, with config.json."""
    sha256: Annotated[str | None, Field(pattern=r"^[0-9a-f]{64}$")] = None
    """Of its weights file. Filled in when the description is read; another file is then refused."""
    public: bool = False
    """Whether it is public weights. Filled in when the description is read."""
    normalisation: Literal["family", "imagenet", "half", "none"] = "family"
    """By which public weights expect pixels in [0, 1] to be standardised; it becomes part of the patch embedding.
    family: as the folder tells, else as the family's published models have it; imagenet: mean .485 .456 .406,
    deviation .229 .224 .225; half: .5 and .5; none."""
    inflate: Literal["mean", "centre"] | None = None
    """How a public kernel becomes one of volumes. mean: spread evenly over the patch's depth; centre: in its middle
    slice alone (arXiv 1705.07750). Needed for streams of volumes without `slices`, without effect on others."""
    inflate_axis: Literal["R", "A", "S"] = "S"
    """Axis of the volume that is the depth."""
    parameters: Annotated[dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] | None, Field(min_length=1)] = (
        None
    )
    """Shared group -> SHA-256 of its float32 parameters in the order of their names, by which sites know the globals of
    round 1. Filled in when the run folder is made; other parameters are then refused."""


def weights_file(path: Path) -> Path:
    """The weights file of a start: the path itself, or the first in a folder that has a known name."""
    names = ("model.safetensors", "pytorch_model.bin")
    if not path.is_dir():
        return path
    return next((path / name for name in names if (path / name).exists()), path / names[0])


def is_public(path: Path) -> bool:
    """Whether a start is public weights: a file, or a folder that is not an own model's."""
    return path.is_file() or ((path / "config.json").exists() and not (path / "run.toml").exists())
