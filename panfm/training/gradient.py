"""Gradient sources: where the trainer gets the patients of a step and the gradient of their losses.

The trainer computes losses, a source makes one gradient of them. `BatchGradient` is the plain one: the gradient of a
batch's mean loss, clipped as a whole. `panfm.privacy.private_step` has the other: clipped per patient and noised.

Shape legend: B subjects.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panfm.data.ahead import done_ahead
from panfm.data.store import Batch, ImageStore
from panfm.seeds import derive_seed, torch_generator
from panfm.training.draw_order import Drawn, draw_order
from panfm.training.experts import ExpertTraining
from panfm.training.objectives.interface import StudentOutput
from panfm.training.token_mask import Contributors, has_loss
from panfm.training.training_state import TrainingState


@dataclass(frozen=True)
class DrawnBatch:
    """Subjects of a step, and the generators of what is drawn for them."""

    subjects: NDArray[np.int64]
    """[B], as indices into the store."""
    inputs: Batch
    """Their images where the run augments them, else their patch features."""
    views: Sequence[Collection[str]]
    """The streams that each view of the subjects shows, one or more views."""
    masks: torch.Generator
    routing: torch.Generator
    augmentation: Sequence[torch.Generator] = ()
    """One for each subject, where the run augments."""


@dataclass(frozen=True)
class StepOutput:
    """Student output and losses of a drawn batch."""

    batch: DrawnBatch
    student: StudentOutput
    losses: Tensor
    """The objective's loss of each subject [B]."""
    progress: float
    """Of the run, in [0, 1]."""


class GradientSource(Protocol):
    """Draws the patients of every step, and turns their losses into its gradient."""

    moves_profile: bool
    """Whether the batches' saliency moves the site's profile."""

    def draw(self) -> Iterator[DrawnBatch]:
        """Begin a step, and yield its patients in one batch or more."""
        ...

    def add(self, output: StepOutput) -> None:
        """Add the losses of one of the step's batches."""
        ...

    def finish(self) -> Tensor:
        """Leave the gradient in the parameters' `.grad`; False, a bool on the device, if the step is to be skipped."""
        ...

    def gate_mass(self) -> Mapping[str, Tensor] | None:
        """Gate mass of the step's patients by layer with experts; None if it must not be known."""
        ...


@dataclass(frozen=True)
class TrainResult:
    """Summary of a round of local training."""

    num_steps: int
    """Steps asked for."""
    num_skipped: int
    """Steps left out because loss or gradient was not finite."""
    loss: float
    """Mean over the steps that counted; NaN when none did."""
    saliency: dict[str, float]
    """Per stream, relative to an equal split (1 = its fair share), on the round's last batch."""
    subjects: int
    """Subjects available for training."""
    subjects_per_stream: dict[str, int]
    gate_mass: dict[str, list[float]]
    """Per layer with experts (`backbone.blocks.0.mlp`) and expert, over the steps that counted; empty if dense."""
    batches: Sequence[Sequence[int]] = ()
    """Subjects of each step that have hidden tokens to predict, as indices into the store; not told of a private round,
    whose batches are secret, and neither is what follows."""
    counted: Sequence[int] = ()
    """Steps that were not left out, as indices into `batches`."""
    contributors_per_stream: Mapping[str, int] = field(default_factory=dict)
    """Distinct subjects behind a stream's part of the model in the steps that counted; see `token_mask.py`."""
    contributors_per_expert: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Layer -> distinct subjects behind each of its experts in those steps."""
    monitors: dict[str, float] = field(default_factory=dict)
    """Of the teacher's features of the round's last batch (monitors.py)."""


class BatchGradient:
    """The gradient of a batch's mean loss, clipped to a norm; keeps the record of a round.

    Every draw comes from a generator derived from (run seed, site, round, purpose).
    """

    moves_profile = True

    def __init__(
        self,
        state: TrainingState,
        experts: ExpertTraining,
        store: ImageStore,
        indices: NDArray[np.int64],
        *,
        site: str,
        round_number: int,
        num_steps: int | None = None,
        workers: int = 0,
    ) -> None:
        """Start a round on some subjects of a store of training inputs (`TrainingState.training_inputs`).

        Args:
            num_steps: Steps that are taken at most; any number when left out.
            workers: Threads that prepare batches ahead of their steps, where the store's are worth it. No number
                depends on them.
        """
        seed, model = state.run.seed, state.model
        self._state, self._store, self._indices = state, store, indices
        self._experts = experts
        order = draw_order(state.run, model.stream_names, store, indices, site, round_number)
        threads = workers if store.read_ahead else 0
        self._prepared = done_ahead(self._prepare, enumerate(islice(order, num_steps)), threads)
        self._augmentation = partial(torch_generator, seed, site, round_number, "augmentation")
        self._sessions = partial(derive_seed, seed, site, round_number, "sessions")
        self._masks = torch_generator(seed, site, round_number, "masking")
        self._routing = torch_generator(seed, site, round_number, "routing")
        layers = model.director_experts()
        num_experts = {name: len(layer.router.activation) for name, layer in layers.items()}
        self._contributors = Contributors(len(store.subjects), len(model.stream_names), num_experts, state.device)
        self._mass = {name: torch.zeros_like(layer.router.activation) for name, layer in layers.items()}
        self._batches: list[list[int]] = []
        self._losses: list[Tensor] = []
        self._counts: list[Tensor] = []
        self.output: StepOutput
        """Of the last step."""
        self.loss: Tensor
        """Mean loss of its batch, without the experts' regularisers."""
        self._total: Tensor
        self._mass_of_step: dict[str, Tensor]

    def draw(self) -> Iterator[DrawnBatch]:
        """Draw one batch."""
        drawn = next(self._prepared)
        yield replace(drawn, inputs=drawn.inputs.to(self._state.device))

    def close(self) -> None:
        """Prepare no further batch."""
        self._prepared.close()

    def _prepare(self, numbered: tuple[int, Drawn]) -> DrawnBatch:
        """Gather the images of a step's subjects."""
        step, (subjects, views) = numbered
        shown = [name for name in self._store.images if any(name in view for view in views)]

        def pick(subject: int, count: int) -> int:
            return self._sessions(step, subject) % count

        inputs, augments = self._store.batch(subjects, shown, pick), self._state.run.augment is not None
        inputs = inputs.pinned() if self._state.device.type == "cuda" else inputs
        generators = [self._augmentation(step, int(subject)) for subject in subjects] if augments else []
        return DrawnBatch(subjects, inputs, views, self._masks, self._routing, generators)

    def add(self, output: StepOutput) -> None:
        """Take the mean of the batch's losses, and add the experts' regularisers."""
        has_hidden = has_loss(output.student.mask, len(output.batch.views))
        self._batches.append(output.batch.subjects[has_hidden].tolist())
        self.output, self.loss = output, output.losses.mean()
        self._total = self._experts.regularise(self.loss, output.student.encoded, output.progress)

    def finish(self) -> Tensor:
        """Compute and clip the gradient; False if loss or gradient is not finite, or nothing was hidden that the loss
        could ask for."""
        self._state.optimiser.zero_grad()
        if not self._total.requires_grad:
            return torch.zeros((), dtype=torch.bool, device=self._total.device)
        self._total.backward()
        return self._clip(self._total.detach())

    def _clip(self, total: Tensor) -> Tensor:
        """Clip the gradient; False if the loss that it is of, or its norm, is not finite."""
        gradients = [parameter.grad for parameter in self._state.parameters if parameter.grad is not None]
        norm, clip_norm = torch.nn.utils.get_total_norm(gradients), self._state.run.train.clip_norm
        factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, torch.where(norm > clip_norm, factor, 1.0))
        return torch.isfinite(total) & torch.isfinite(norm)

    def gate_mass(self) -> Mapping[str, Tensor]:
        """Gate mass of the batch by layer; that of a subject is the mean over its views."""
        mass = self._experts.gate_mass(self.output.student.encoded)
        self._mass_of_step = {name: sums / len(self.output.batch.views) for name, sums in mass.items()}
        return self._mass_of_step

    def record(self, counts: Tensor) -> None:
        """Record the last step and whether it counts, a bool on the device, which is asked at the end of the round."""
        subjects, student = self.output.batch.subjects, self.output.student
        self._contributors.add(subjects, student.mask, student.encoded, self._state.model.stream_of_patch, counts)
        for name, mass in self._mass_of_step.items():
            self._mass[name] += torch.where(counts, mass, 0.0)
        self._losses.append(self.loss.detach())
        self._counts.append(counts)

    def result(self, saliency: dict[str, float], monitors: dict[str, float]) -> TrainResult:
        """Summary of the round; `saliency` and `monitors` are those of its last batch."""
        store, names = self._store, self._state.model.stream_names
        counted, losses = torch.stack(self._counts).cpu().numpy(), torch.stack(self._losses).tolist()
        kept = [loss for loss, counts in zip(losses, counted, strict=True) if counts]
        return TrainResult(
            num_steps=len(self._batches),
            num_skipped=len(losses) - len(kept),
            loss=float(np.mean(kept)) if kept else float("nan"),
            saliency=saliency,
            subjects=len(self._indices),
            subjects_per_stream={name: len(store.holders(self._indices, [name])) for name in store.images},
            gate_mass={name: mass.tolist() for name, mass in self._mass.items()},
            batches=self._batches,
            counted=np.flatnonzero(counted).tolist(),
            contributors_per_stream=dict(zip(names, self._contributors.per_stream(), strict=True)),
            contributors_per_expert=self._contributors.per_expert(),
            monitors=monitors,
        )
