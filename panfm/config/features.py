"""`[features]`: how a patient's embedding is read off the model."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from panfm.config.base import Config

Pooling = Literal["cls", "mean", "cls+mean", "per-stream", "layers", "per-stream-layers"]


class FeaturesConfig(Config):
    """Pooling and whitening of the embeddings that `embed`, probes and exports give; training does not use them."""

    pooling: Pooling = "cls"
    """cls: the CLS token; mean: the mean of all tokens; cls+mean: both; per-stream: CLS and the mean of each stream's
    tokens, zeros where a patient lacks the stream; layers: CLS, mean and standard deviation of the tokens of several
    blocks; per-stream-layers: the same with mean and deviation of each stream's tokens."""
    layers: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(strict=False, max_length=64)] = ()
    """Blocks of the last two poolings, ascending, the first is 1; all when left out. Of a ViT-S with public weights:
    [8, 10, 12]."""
    whitening: bool = False
    """Whether features are multiplied by a within-image whitening, which is fitted from training images after the last
    round: directions in which a crop of an image differs from the whole count for less."""
    whitening_lambda: Annotated[float, Field(ge=0.1, le=1000.0)] = 1.0
    """Share of every direction that stays: 1 as much as the mean of all differences. Below 0.3 probes got worse."""
    whitening_crops: Annotated[int, Field(ge=2, le=10_000)] = 300
    """Crops per stream and site from which it is fitted."""

    @model_validator(mode="after")
    def _layers_belong_to_the_pooling(self) -> Self:
        if self.layers and not self.reads_blocks:
            raise ValueError(f'layers: only for pooling = "layers" or "per-stream-layers" (got "{self.pooling}")')
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers: expected ascending numbers, none twice (got {list(self.layers)})")
        return self

    @property
    def reads_blocks(self) -> bool:
        """Whether the outputs of blocks are read, and not those of the last norm alone."""
        return self.pooling in ("layers", "per-stream-layers")

    @property
    def pooling_text(self) -> str:
        """The pooling as `--pooling` takes it: `cls`, `layers`, `layers:8,10,12`."""
        return f"{self.pooling}:{','.join(map(str, self.layers))}" if self.layers else self.pooling

    def couplings(self) -> Iterator[str]:
        """Yield what lets numbers of patients out of a private run without noise."""
        if self.whitening:
            yield "whitening: is fitted from patients' images without noise, set false"
