"""Draws which tokens are hidden from the student, and counts the subjects behind a round's update.

Exactly `round(ratio x tokens)` patches of a subject are hidden (at least one, never all); the policy (`policies.py`)
decides how that budget is spread over streams. A patch's key is its stream's score plus Gumbel noise, and the patches
with the highest keys are hidden: sampling without replacement in proportion to exp(score) (Kool et al. 2019,
Gumbel-top-k).

A subject from whom nothing is hidden has no loss to speak of, so it does not count. Of the others, a subject counts for
a stream where it has hidden tokens, where it has visible ones, and for an expert that its tokens go through. Where
labels are learned, nothing is hidden, and a subject counts for the streams that it has.

Shape legend: B subjects, N patches, S streams, V visible and K hidden patches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panfm.config.masking import MaskingConfig
from panfm.data.store import send
from panfm.models.backbone import Encoded
from panfm.models.tokens import Layout
from panfm.registry import MASKING_POLICIES
from panfm.training.policies import MaskingPolicy
from panfm.training.saliency import streams_present


@dataclass(frozen=True)
class TokenMask:
    """Which tokens of a batch the student sees, and which it predicts."""

    layout: Layout
    """All patches [B, N]."""
    visible: Layout
    """The visible patches [B, V]."""
    visible_column: Tensor
    """int64 [B, V], where in `layout` each visible patch stands."""
    hidden: Layout
    """The hidden patches [B, K]."""
    hidden_column: Tensor
    """int64 [B, K], where in `layout` each hidden patch stands."""
    is_whole: bool = False
    """Whether the objective hides no token and computes its loss from the visible ones."""

    @property
    def asked(self) -> Layout:
        """The patches on which the loss depends: the hidden ones, or all of a mask that hides nothing."""
        return self.visible if self.is_whole else self.hidden

    @classmethod
    def whole(cls, layout: Layout) -> Self:
        """Hide nothing."""
        everything, counts = layout.valid, layout.lengths()
        nothing = ~everything
        return cls(layout, *layout.select(everything, counts), *layout.select(nothing, 0 * counts), is_whole=True)

    @classmethod
    def of(cls, layout: Layout, hidden: Tensor, counts: NDArray[np.int64] | None = None) -> Self:
        """Hide some patches (bool [B, N]), so many of each subject [B]; the device is asked how many if that is left
        out."""
        counts = (hidden & layout.valid).sum(dim=1).cpu().numpy() if counts is None else counts
        return cls(layout, *layout.select(~hidden, layout.lengths() - counts), *layout.select(hidden, counts))


def build_policy(config: MaskingConfig, organs: Sequence[str]) -> MaskingPolicy:
    """The policy of a description, for streams of these organs."""
    policy: MaskingPolicy = MASKING_POLICIES.load(config.policy)(config, organs)
    return policy


def draw_mask(
    policy: MaskingPolicy,
    relative: Tensor,
    layout: Layout,
    stream_of_patch: Tensor,
    *,
    step: int,
    generator: torch.Generator,
) -> TokenMask:
    """Draw the hidden patches of a batch.

    Guarantees:
        budget: a subject with n tokens has exactly clip(round(ratio n), 1, n - 1) hidden; with one token, none.

    Args:
        relative: Saliency of the streams relative to an equal split, [B, S] or [1, S].
        step: Local steps taken since the start of the run.
    """
    stream = stream_of_patch[layout.patch_index]
    noise = policy.noise * send(_gumbel(stream.shape, generator), stream.device)
    scores = send(policy.scores(relative, len(stream), step, generator), stream.device)
    key = scores.expand(len(stream), -1).gather(1, stream) + noise
    rank = key.masked_fill(~layout.valid, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1)
    count = torch.from_numpy(layout.lengths())
    budget = (count * policy.config.ratio).round().long().clamp_min(1).minimum(count - 1)
    hidden = (rank < send(budget, rank.device)[:, None]) & layout.valid
    return TokenMask.of(layout, hidden, budget.clamp_min(0).numpy())


def _gumbel(shape: torch.Size, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=generator).clamp(1e-7, 1.0 - 1e-7)
    return -(-uniform.log()).log()


def has_loss(mask: TokenMask, num_views: int = 1) -> NDArray[np.bool_]:
    """Which subjects of a batch have tokens on which their loss depends, in any of their views, bool [B]."""
    return np.asarray((mask.asked.lengths() > 0).reshape(num_views, -1).any(axis=0))


class Contributors:
    """Counts the distinct subjects behind the steps of a round; on the device, which is asked at the end."""

    def __init__(self, num_subjects: int, num_streams: int, experts: Mapping[str, int], device: torch.device) -> None:
        """Start a round.

        Args:
            num_subjects: Of the site's store.
            experts: Layer -> number of its experts.
        """
        self._num_streams, self._experts = num_streams, experts
        columns = 2 * num_streams + sum(experts.values())
        self.marks = torch.zeros(num_subjects, columns, dtype=torch.bool, device=device)
        """A column for each stream whose tokens are asked for, for each that is shown, and for each expert."""

    def add(
        self, subjects: NDArray[np.int64], mask: TokenMask, encoded: Encoded, stream_of_patch: Tensor, counts: Tensor
    ) -> None:
        """Count a step's subjects [B], all different, as indices into the store, if the step `counts`; mask and
        encoding have one view after another."""
        layouts = (mask.asked, mask.visible)
        here = [streams_present(layout, stream_of_patch, self._num_streams) for layout in layouts]
        for size, routed in zip(self._experts.values(), encoded.routed, strict=True):
            chosen = routed.chosen.reshape(len(here[0]), -1)  # by subject, or by each of its tokens
            here.append(here[0].new_zeros(len(chosen), size).scatter_(1, chosen, value=True))
        marks = torch.cat(here, dim=1) & mask.asked.valid.any(dim=1, keepdim=True) & counts
        rows = send(torch.from_numpy(subjects), marks.device)
        self.marks[rows] |= marks.unflatten(0, (-1, len(subjects))).any(dim=0)

    def per_stream(self) -> list[int]:
        """Subjects behind each stream: those whose loss asks for its tokens or those who show them, whichever are
        fewer."""
        asked, visible = self.marks[:, : 2 * self._num_streams].sum(dim=0).chunk(2)
        fewest: list[int] = asked.minimum(visible).tolist()
        return fewest

    def per_expert(self) -> dict[str, list[int]]:
        """Layer -> subjects whose tokens went through each of its experts."""
        counted = self.marks[:, 2 * self._num_streams :].sum(dim=0).split(list(self._experts.values()))
        return {layer: numbers.tolist() for layer, numbers in zip(self._experts, counted, strict=True)}
