"""Which subjects a round's update comes from, part by part of the model.

A subject from whom nothing is hidden has no loss to speak of, so it does not count. Of the others, a subject counts for
a stream where it has hidden tokens, where it has visible ones, and for an expert that its tokens go through.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from panfm.models.backbone import Encoded
from panfm.training.masking import TokenMask
from panfm.training.saliency import streams_present


def has_loss(mask: TokenMask) -> NDArray[np.bool_]:
    """Which subjects of a batch have hidden tokens to predict, bool [B]."""
    has_hidden: NDArray[np.bool_] = mask.hidden.valid.any(dim=1).cpu().numpy()
    return has_hidden


class Contributors:
    """Counts the distinct subjects behind the steps of a round."""

    def __init__(self, num_subjects: int, num_streams: int, experts: Mapping[str, int]) -> None:
        """Start a round.

        Args:
            num_subjects: Of the site's store.
            experts: Layer -> number of its experts.
        """
        self._hidden = np.zeros((num_streams, num_subjects), dtype=bool)
        self._visible = np.zeros((num_streams, num_subjects), dtype=bool)
        self._experts = {layer: np.zeros((count, num_subjects), dtype=bool) for layer, count in experts.items()}

    def add(
        self, subjects: NDArray[np.int64], mask: TokenMask, encoded: Encoded, stream_of_place: torch.Tensor
    ) -> None:
        """Count a step's subjects [B], as indices into the store."""
        counting = has_loss(mask)
        for marks, layout in ((self._hidden, mask.hidden), (self._visible, mask.visible)):
            present = streams_present(layout, stream_of_place, len(marks)).cpu().numpy()
            marks[:, subjects[counting]] |= present[counting].T
        for marks, routed in zip(self._experts.values(), encoded.routed, strict=True):
            chosen = routed.chosen.cpu().numpy().reshape(len(subjects), -1)  # by subject, or by each of its tokens
            marks[chosen[counting], subjects[counting, None]] = True

    def per_stream(self) -> list[int]:
        """Subjects behind each stream: those who predict its tokens or those who show them, whichever are fewer."""
        fewest: list[int] = np.minimum(self._hidden.sum(axis=1), self._visible.sum(axis=1)).tolist()
        return fewest

    def per_expert(self) -> dict[str, list[int]]:
        """Layer -> subjects whose tokens went through each of its experts."""
        return {layer: marks.sum(axis=1).tolist() for layer, marks in self._experts.items()}
