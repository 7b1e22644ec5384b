"""Which tokens are hidden from the student.

Every policy hides exactly `round(ratio x tokens)` places of a subject (at least one, never all); policies differ only
in how that budget is spread over streams. A place's score is its stream's log-odds plus Gumbel noise, and the highest
scores are hidden: sampling without replacement in proportion to exp(log-odds) (Kool et al. 2019, Gumbel-top-k).

    random   0
    sgm      clip(strength(t) x log r, +-limit)      r: saliency of the stream relative to an equal split
    inverse  the same, sign turned
    static   +strength for `static-organs`, 0 for the others
    organ    whole streams in random order until the budget is spent

    strength(t) = strength x min(t / warmup-steps, 1) x (f(t) + (1 - f(t)) g)
    f(t)        1 for the first `settle-steps` local steps, over as many more by cosine to 0
    g           1 where the saliency's normalised entropy is 0.1 or more below `balance`, linearly to 0 at `balance`

Dominance is learned in the first few hundred steps, so guidance is full there, and limits itself by log r. Later it
costs more than it gains (the dominant streams must be learned too), unless dominance lasts: g looks whether it does.
Steps are counted, not shares of the run, because that is how dominance comes and goes (simulations/studies/LOG.md).

Source: Pan-FM (arXiv 2605.07055) for guiding masks by saliency; formula and schedule are this project's.
Shape legend: B subjects, N places, S streams.
"""

import math
from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor

from panfm.config.masking import MaskingConfig
from panfm.models.tokens import Layout
from panfm.training.saliency import normalised_entropy

_LEAST_RELATIVE_SALIENCY = 0.05
"""Saliency below this share of an equal split counts as this share, so that no stream is left out for good."""


_BALANCE_RANGE = 0.1
"""Entropy below `balance` at which guidance that lasts has its full strength."""


def is_guided(config: MaskingConfig) -> bool:
    """Whether saliency steers the masks."""
    match config.policy:
        case "sgm" | "inverse":
            return True
        case "random" | "organ" | "static":
            return False
        case _:
            assert_never(config.policy)


def stream_scores(config: MaskingConfig, relative: Tensor, organs: Sequence[str], step: int) -> Tensor:
    """Log-odds of hiding, per stream.

    Args:
        relative: Saliency relative to an equal split, [B, S] or [1, S]; 1 = as much as an equal split, 0 = absent.
        organs: Organ of each stream.
        step: Local steps taken since the start of the run.
    Returns:
        Scores, same shape as `relative`.
    """
    strength = config.strength * guidance(config, relative, step)
    guided = (strength * relative.clamp_min(_LEAST_RELATIVE_SALIENCY).log()).clamp(-config.limit, config.limit)
    match config.policy:
        case "sgm":
            return guided
        case "inverse":
            return -guided
        case "static":
            chosen = torch.tensor([organ in config.static_organs for organ in organs], device=relative.device)
            return torch.zeros_like(relative) + config.strength * chosen
        case "random" | "organ":
            return torch.zeros_like(relative)
        case _:
            assert_never(config.policy)


def guidance(config: MaskingConfig, relative: Tensor, step: int) -> Tensor:
    """Share of `strength` in force at a step, [B, 1] or [1, 1]: rise, then settle to what imbalance asks for."""
    rise = min((step + 1) / config.warmup_steps, 1.0)
    fade = 0.5 * (1.0 + math.cos(math.pi * min(max(step / config.settle_steps - 1.0, 0.0), 1.0)))
    lasting = ((config.balance - normalised_entropy(relative)) / _BALANCE_RANGE).clamp(0.0, 1.0)
    return rise * (fade + (1.0 - fade) * lasting)


def draw_hidden(
    config: MaskingConfig, scores: Tensor, layout: Layout, stream_of_place: Tensor, generator: torch.Generator
) -> Tensor:
    """Draw the hidden places, bool [B, N].

    Guarantees:
        budget: a subject with n tokens has exactly clip(round(ratio n), 1, n - 1) hidden; with one token, none.
    """
    stream = stream_of_place[layout.place]
    noise = _gumbel(stream.shape, generator)
    match config.policy:
        case "organ":
            order = torch.rand(len(stream), scores.shape[1], generator=generator)
            key = order.to(stream.device).gather(1, stream) + 1e-6 * noise.to(stream.device)
        case "random" | "sgm" | "inverse" | "static":
            key = scores.expand(len(stream), -1).gather(1, stream) + noise.to(stream.device)
        case _:
            assert_never(config.policy)
    rank = key.masked_fill(~layout.valid, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1)
    count = layout.valid.sum(dim=1)
    budget = (count * config.ratio).round().long().clamp_min(1).minimum(count - 1)
    return (rank < budget[:, None]) & layout.valid


def _gumbel(shape: torch.Size, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=generator).clamp(1e-7, 1.0 - 1e-7)
    return -(-uniform.log()).log()
