"""`[train]`: the local loop, and how much of it."""

from typing import Annotated, Literal

from pydantic import Field

from panfm.config.base import BelowOne, ClipNorm, Fraction, Positive, Uncoupled
from panfm.config.parts import PartsConfig, PlainPartsConfig


class TrainConfig(Uncoupled):
    """The local loop, and how much of it."""

    rounds: Annotated[int, Field(gt=0, le=1_000_000)] = 10
    """Number of rounds; in each round the sites train and the server averages their updates."""
    local_steps: Annotated[int, Field(gt=0, le=1_000_000)] = 20
    """Optimiser steps per site and round."""
    validate_every: Positive = 5
    """Rounds between a site's validations of its own model, on its val split; the last round always ends with one."""
    batch_size: Annotated[int, Field(gt=0, le=65_536)] = 32
    """Patients per step."""
    parts: PartsConfig = PlainPartsConfig()
    """The part of the model that is trained; the rest stays as the run started it, and does not travel."""
    layer_decay: Annotated[float, Field(ge=0.01, le=1.0)] = 1.0
    """Factor on the learning rate per layer downwards: heads and last norm 1, the last block this, the one before it
    this squared (arXiv 2106.08254)."""
    learning_rate: Annotated[float, Field(ge=1e-9, le=10.0)] = 3e-3
    """Peak learning rate of AdamW, reached at the end of the warm-up."""
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.05
    """Weight decay of AdamW; a step shrinks weights by this times the learning rate."""
    betas: Annotated[tuple[BelowOne, BelowOne], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of AdamW's running means of gradients and of their squares."""
    optimiser_state: Literal["kept", "fresh"] = "kept"
    """AdamW's means when a site starts a round. kept: as they were after its last round, in its private state; fresh:
    empty, as clients of FedAvg begin in most frameworks."""
    warmup: Fraction = 0.1
    """Share of the whole run over which the learning rate grows; then cosine to 0."""
    clip_norm: ClipNorm = 3.0
    """A batch's gradient with a larger norm is scaled down to this norm."""
    teacher_momentum: Annotated[tuple[Fraction, Fraction], Field(strict=False)] | Literal["auto"] = (0.99, 0.999)
    """EMA momentum of the teacher at the start and the end, by cosine. auto: 1 - 10 / n and 1 - 1 / n in a run of n
    local steps, so that the teacher forgets its start in a short run as in a long one; [1, 1] keeps it as it starts."""
    teacher_start: Literal["own", "global", "server-ema"] = "own"
    """Where a site's teacher starts a round. own: where it ended the site's last one; global: at the parameters that
    the server sends, as the student does; server-ema: at the server's EMA of these, which is sent as well."""
    server_ema: BelowOne = 0.9
    """Momentum per round of that EMA."""
    proximal_mu: Annotated[float, Field(ge=0.0, le=1e3)] = 0.0
    """FedProx (arXiv 1812.06127): after each step, parameters go back by this x learning rate of their way from the
    round's global ones; apart from Adam's scaling, as weight decay is in AdamW."""
    precision: Literal["auto", "float32"] = "auto"
    """auto: bf16 autocast on CUDA, float32 on CPU."""
    activations: Literal["kept", "recomputed"] = "kept"
    """What a step keeps of its blocks for the backward pass. recomputed: each block's input, the rest is computed a
    second time, with the same bits: less memory, more time."""
    threads: Annotated[int, Field(gt=0, le=256)] = 1
    """CPU threads per site; part of the run because it decides the last bits."""

    @property
    def teacher_momenta(self) -> tuple[float, float]:
        """EMA momentum of the teacher at the start and the end."""
        if self.teacher_momentum == "auto":
            return max(0.0, 1.0 - 10.0 / self.total_steps), 1.0 - 1.0 / self.total_steps
        return self.teacher_momentum

    @property
    def total_steps(self) -> int:
        """Local steps of one site over the whole run."""
        return self.rounds * self.local_steps
