"""One patient in a private step: the images, what is hidden of them, the targets, and the loss.

Every tensor is made from this patient alone. Shapes follow from the streams that the patient holds, and nobody else's
data, number or order decides a path through the code.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panfm.data.store import Batch, ImageStore
from panfm.training import Learner
from panfm.training.experts import ExpertTraining
from panfm.training.objective import Split, Targets, masked_view


@dataclass(frozen=True)
class Patient:
    """One patient, ready for the student."""

    maps: Batch
    """Stem maps of a batch of one."""
    split: Split
    targets: Targets
    experts: ExpertTraining
    """Draws the routers' noise from the patient's own generator."""
    position: float
    """Of the step in the run."""


def patients_with_streams(store: ImageStore, indices: NDArray[np.int64], streams: Sequence[str]) -> NDArray[np.int64]:
    """The indices of subjects that hold any of the streams, in their order."""
    rows = [store.rows[stream] for stream in streams if stream in store.rows]
    return indices[np.isin(indices, np.concatenate(rows))] if rows else indices[:0]


def one_patient(store: ImageStore, index: int, device: torch.device) -> Batch:
    """A batch of one subject, in memory that torch allocated: kernels may round by how their input is aligned."""
    batch = store.batch([index])
    return Batch(1, {name: image.clone() for name, image in batch.images.items()}, batch.rows).to(device)


def patient_loss(learner: Learner, patient: Patient) -> Tensor:
    """Loss of one patient, a number: the objective, and the experts' alignment."""
    exploration = patient.experts.exploration(patient.position)
    view = masked_view(learner.model, patient.maps, patient.split, exploration)
    loss = learner.objective.loss(learner.model, view, patient.targets)
    if patient.experts.layers:
        loss = loss + learner.run.model.experts.alignment_weight * patient.experts.alignment(view.seen)
    return loss.sum()
