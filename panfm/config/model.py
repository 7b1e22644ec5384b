"""`[model]`: size, tokenizer and backbone."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from panfm.config.base import Config, Fraction, Temperature, Weight, plug_in
from panfm.registry import BACKBONES


def _one_for_all_blocks(number: Any) -> Any:
    return (number,) if isinstance(number, int) else number


PerBlock = Annotated[
    tuple[Annotated[int, Field(gt=0, le=1024)], ...],
    Field(strict=False, min_length=1),
    BeforeValidator(_one_for_all_blocks),
]
"""One number for all blocks, or a list with one for each."""

TOKENIZER_INPUTS = {"statistics": 3, "texture": 6, "patch": 1}
"""Tokenizer -> numbers that it reads of every channel and block, or voxel."""


class ExpertsConfig(Config):
    """Director-Experts (DEX, arXiv 2605.21861). Pairs are values at the start and the end of the run, by cosine."""

    count: PerBlock = (8,)
    """Experts in a block."""
    active: PerBlock = (2,)
    """Experts that a patient uses; all tokens of a patient use the same."""
    temperature: Temperature = 0.5
    """Of the router's softmax."""
    noise: Annotated[tuple[Weight, Weight], Field(strict=False)] = (1.0, 0.0)
    """Scale of the exploration noise on the router's logits."""
    director_momentum: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.99, 0.999)
    """EMA momentum of the director, which follows the experts by their gate mass."""
    alignment: Literal["cosine", "softmax"] = "cosine"
    """How the experts are pulled to the director: `cosine` as in the paper, `softmax` (cross-entropy over features) as
    in the released code."""
    alignment_weight: Weight = 0.01
    """Weight in the loss of the pull of the experts to the director."""
    balance_weight: Annotated[tuple[Weight, Weight], Field(strict=False)] = (0.001, 0.0)
    """Weight of the pull to equal use of the experts; the released code has 0.01 throughout."""


class ModelConfig(Config):
    """The pan-organ transformer."""

    size: Literal["nano", "tiny", "small", "base", "large"] = "nano"
    """nano: 48 wide, 2 blocks, for laptops; tiny, small, base, large: the widths, depths and heads of ViT-T/S/B/L."""
    tokenizer: Literal["statistics", "texture", "patch"] = "statistics"
    """statistics: mean, log-sd and mean gradient of sub-blocks, then linear (learns fastest on small cohorts);
    texture: mean, log-sd and log mean difference in four directions of the plane, then linear;
    patch: linear on raw voxels, as in ViT."""
    backbone: Annotated[str, plug_in(BACKBONES)] = "dense"
    """dense: a ViT; director-experts: every block's MLP is a pool of experts and one director."""
    hidden_multiple: Annotated[int, Field(gt=0, le=64)] = 4
    """Hidden width of an MLP (dense, expert or director) over the model's width. A pool of which K experts are active
    costs as much as a dense MLP at 1/K of its multiple."""
    positions: Literal["fixed", "learned", "rotary"] = "fixed"
    """Of a stream's patches. fixed: sin-cos; learned: parameters of the stream, as public ViTs have them; rotary:
    queries and keys are turned by place, as in DINOv3 (streams of images alone)."""
    registers: Annotated[int, Field(ge=0, le=64)] = 0
    """Tokens that stand for no patch (arXiv 2309.16588), beside CLS."""
    layer_scale: bool = False
    """Whether what attention and MLP add is scaled, number by number, by a learned factor (arXiv 2103.17239)."""
    norm_epsilon: Annotated[float, Field(ge=1e-12, le=1e-2)] = 1e-6
    """Added to the variance in the backbone's layer norms."""
    experts: ExpertsConfig = ExpertsConfig()
    """Only for `director-experts`."""

    def couplings(self) -> Iterator[str]:
        """Yield what couples patients, as `key: why, remedy`, one line each; the backbone's class declares it."""
        backbone = BACKBONES.load(self.backbone)
        if "couplings" not in vars(backbone):  # what a class inherits was declared for another
            yield f'backbone: "{self.backbone}" does not declare whether it couples patients, set one that does'
        else:
            yield from backbone.couplings(self)
