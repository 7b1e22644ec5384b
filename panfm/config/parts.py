"""`[train.parts]`: the part of the model that a run trains; the rest stays as the run started it, and does not travel.

| kind | trained |
|---|---|
| all | everything |
| head | the head of the run's `[task]` alone; the encoder is frozen |
| last-blocks | the last `blocks` blocks of the backbone, its last norm, and the heads |
| attention-projections | the output projection of attention in the last `blocks` blocks, and the heads |
| norms | the backbone's layer norms, and the heads |
| vectors | every parameter of one axis: norms, biases, CLS, streams' embeddings and queries; no matrix of a head |
| lora | low-rank additions to the attention of the last `blocks` blocks, and the heads |

Tokenizers are trained by `all` alone, and their vectors by `vectors`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from panfm.config.base import Config

Blocks = Annotated[int, Field(gt=0, le=1024)]


class PlainPartsConfig(Config):
    """Parts that need no number."""

    kind: Literal["all", "head", "norms", "vectors"] = "all"


class BlockPartsConfig(Config):
    """Parts of the last blocks."""

    kind: Literal["last-blocks", "attention-projections"]
    blocks: Blocks
    """Counted from the last."""


class LoraConfig(Config):
    """Low-rank additions W + B A to the weights of attention (arXiv 2106.09685): queries, keys and values together, and
    the output projection. A [rank, in] is drawn by `seed`, B [out, rank] starts at zero."""

    kind: Literal["lora"]
    rank: Annotated[int, Field(gt=0, le=1024)] = 8
    """Rank of the low-rank addition B A: rows of A, columns of B."""
    blocks: Blocks
    """Counted from the last."""
    frozen_a: bool = False
    """Train B alone (FFA-LoRA, arXiv 2403.12313): the mean of sites' products is then the product of their means, and
    noise is not multiplied with noise; private runs need it."""


def _of_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


PartsConfig = Annotated[
    PlainPartsConfig | BlockPartsConfig | LoraConfig, Field(discriminator="kind"), BeforeValidator(_of_kind)
]
"""A table; or its kind alone, where that needs no number."""
