"""A batch of patients, seen as patients: trees of tensors whose first axis are the patients, and the loss of one.

Patients of one chunk hold the same streams, so that they have as many tokens, and hide as many, and one program serves
them all. Targets and masks are drawn outside of it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from panfm.data.store import Batch, ImageStore
from panfm.models import PanModel
from panfm.models.director_experts import Exploration
from panfm.models.tokens import Layout
from panfm.objectives.experts import ExpertTraining
from panfm.objectives.objective import Objective, Split, Targets, masked_view


def chunks_of_equals(
    store: ImageStore, indices: NDArray[np.int64], streams: Sequence[str], size: int
) -> Iterator[NDArray[np.int64]]:
    """Chunks of at most `size` subjects that hold the same of the streams; who holds none is left out."""
    held = np.zeros((len(indices), len(streams)), dtype=bool)
    for column, stream in enumerate(streams):
        held[:, column] = np.isin(indices, store.rows.get(stream, []))
    for kind in np.unique(held, axis=0):
        equals = indices[(held == kind).all(axis=1)]
        for start in range(0, len(equals) if kind.any() else 0, size):
            yield equals[start : start + size]


def as_patients(maps: Batch, split: Split, targets: Targets, noise: Sequence[Tensor] = ()) -> dict[str, Any]:
    """The batch as a tree; all its subjects hold the same streams.

    Args:
        noise: For the routers, [B, R] per layer with experts, scale included.
    """
    return {
        "noise": tuple(noise),
        "images": dict(maps.images),
        "place": split.layout.place,
        "visible": (split.visible.place, split.visible_column),
        "hidden": (split.hidden.place, split.hidden_column),
        "targets": dict(targets),
    }


class PatientLoss(nn.Module):
    """Loss of one patient, as a function of the student's parameters: the objective, and experts' alignment."""

    def __init__(self, student: PanModel, objective: Objective, experts: ExpertTraining) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.experts = experts

    def forward(self, patient: dict[str, Any]) -> Tensor:
        """The loss of a tree as `as_patients` makes it, without the patients' axis."""
        images = {name: image[None] for name, image in patient["images"].items()}
        place = patient["place"]
        rows = {name: torch.zeros(1, dtype=torch.long, device=place.device) for name in images}
        maps = Batch(1, images, rows)
        visible, hidden = patient["visible"], patient["hidden"]
        split = Split(_layout(place), _layout(visible[0]), visible[1][None], _layout(hidden[0]), hidden[1][None])
        targets = {name: target[None] for name, target in patient["targets"].items()}
        drawn = iter(patient["noise"])
        exploration = Exploration(1.0, lambda _: next(drawn)[None]) if patient["noise"] else None
        view = masked_view(self.student, maps, split, exploration)
        loss = self.objective.loss(self.student, view, targets)
        if patient["noise"]:
            loss = loss + self.experts.config.alignment_weight * self.experts.alignment(view.seen)
        return loss.sum()


def _layout(place: Tensor) -> Layout:
    """One patient's places, none of them padding."""
    return Layout(place[None], torch.ones(1, place.shape[0], dtype=torch.bool, device=place.device))
