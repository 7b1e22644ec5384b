"""Which tokens are hidden from the student.

Every policy hides exactly `round(ratio x tokens)` places of a subject (at least one, never all); policies differ only
in how that budget is spread over streams. A place's score is its stream's log-odds plus Gumbel noise, and the highest
scores are hidden: sampling without replacement in proportion to exp(log-odds) (Kool et al. 2019, Gumbel-top-k).

    random   0
    sgm      strength x log(saliency of the stream relative to an equal split)      Pan-FM, arXiv 2605.07055
    inverse  the same, sign turned
    static   +strength for `static-organs`, 0 for the others
    organ    whole streams in random order until the budget is spent

Shape legend: B subjects, N places, S streams.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from panfm.config.run import MaskingConfig
from panfm.models.tokens import Layout
from panfm.objectives.schedules import rise_and_anneal

_LEAST_RELATIVE_SALIENCY = 0.05
"""Saliency below this share of an equal split counts as this share, so that no stream is left out for good."""


def stream_scores(config: MaskingConfig, relative: Tensor, organs: Sequence[str], position: float) -> Tensor:
    """Log-odds of hiding, per stream.

    Args:
        relative: Saliency relative to an equal split, [B, S] or [1, S]; 1 = as much as an equal split.
        organs: Organ of each stream.
        position: Where in the run, 0 to 1.
    Returns:
        Scores, same shape as `relative`.
    """
    strength = config.strength * rise_and_anneal(position, warmup=config.warmup, anneal=config.anneal)
    guided = strength * relative.clamp_min(_LEAST_RELATIVE_SALIENCY).log()
    if config.policy == "sgm":
        return guided
    if config.policy == "inverse":
        return -guided
    if config.policy == "static":
        chosen = torch.tensor([organ in config.static_organs for organ in organs], device=relative.device)
        return torch.zeros_like(relative) + config.strength * chosen
    return torch.zeros_like(relative)


def draw_hidden(
    config: MaskingConfig, scores: Tensor, layout: Layout, stream_of_place: Tensor, generator: torch.Generator
) -> Tensor:
    """Draw the hidden places, bool [B, N].

    Guarantees:
        budget: a subject with n tokens has exactly clip(round(ratio n), 1, n - 1) hidden; with one token, none.
    """
    stream = stream_of_place[layout.place]
    noise = _gumbel(stream.shape, generator)
    if config.policy == "organ":
        order = torch.rand(len(stream), scores.shape[1], generator=generator)
        key = order.to(stream.device).gather(1, stream) + 1e-6 * noise.to(stream.device)
    else:
        key = scores.expand(len(stream), -1).gather(1, stream) + noise.to(stream.device)
    rank = key.masked_fill(~layout.valid, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1)
    count = layout.valid.sum(dim=1)
    budget = (count * config.ratio).round().long().clamp_min(1).minimum(count - 1)
    return (rank < budget[:, None]) & layout.valid


def _gumbel(shape: torch.Size, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=generator).clamp(1e-7, 1.0 - 1e-7)
    return -(-uniform.log()).log()
