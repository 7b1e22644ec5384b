"""Trains with several processes of one site, each with a part of every batch; only `limits.devices` above 1 imports it.

All processes draw the same batches, masks and noise. Each computes the losses of its subjects; gradients and sums over
the batch are added up, so that every process takes the step of the whole batch: the same update, up to rounding, as one
process takes. The process of rank 0 keeps the record of the round.

Shape legend: B subjects of a batch, V views, N patches, S streams.
"""

import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from panfm.config import RunConfig
from panfm.data.store import Batch, ImageStore, send
from panfm.errors import ConfigError, LimitError
from panfm.models import batch_sums
from panfm.models.backbone import Encoded, Exploration
from panfm.registry import BACKBONES, import_class
from panfm.training.draw_order import Drawn
from panfm.training.experts import ExpertTraining
from panfm.training.gradient import BatchGradient, DrawnBatch, StepOutput, TrainResult
from panfm.training.token_mask import TokenMask, draw_mask
from panfm.training.trainer import Trainer


def check_spread(run: RunConfig, devices: int) -> None:
    """Check that a run's steps can be spread over the site's devices.

    Raises:
        LimitError: the run's steps cannot be spread.
        ConfigError: the site has fewer GPUs than `limits.devices` says.
    """
    rule = f"this site's limits.devices is {devices}, which it takes part with in runs whose batches can be split"
    if run.patient_dp is not None:
        raise LimitError.of_question(f"patient-dp: steps of a private run are taken on one device; {rule}")
    objective, declared = import_class(run.objective.implementation), getattr(run.objective, "couplings", None)
    if not objective.spreads and (declared is None or any(declared())):
        raise LimitError.of_question(f"objective.name: {run.objective.name} couples the patients of a batch; {rule}")
    if run.model.backbone not in BACKBONES.built_in:
        raise LimitError.of_question(f"model.backbone: {run.model.backbone} is a plug-in; {rule}")
    if torch.cuda.is_available() and torch.cuda.device_count() < devices:
        raise ConfigError(
            f"limits.devices: {devices}, expected at most {torch.cuda.device_count()}, the GPUs that PyTorch shows"
        )


@dataclass(frozen=True)
class Share:
    """The part of a batch that one process computes."""

    whole: Batch
    """The batch of all processes, view after view, without images."""
    num_subjects: int
    """B, of the batch of all processes."""
    subjects: NDArray[np.int64]
    """Places of this process's subjects in it; at least one."""
    weight: int
    """1, or 0 for a process that computes a copy of the first subject, where there are more processes than subjects."""

    @classmethod
    def of(cls, store: ImageStore, subjects: NDArray[np.int64], views: Sequence[Collection[str]]) -> "Share":
        """This process's share of a batch of a store's subjects."""
        size, rows = len(subjects), {}
        for name, subjects_of in store.rows.items():
            holders = np.flatnonzero(np.isin(subjects, subjects_of))
            parts = [number * size + holders for number, view in enumerate(views) if name in view]
            if parts and len(holders):
                rows[name] = torch.from_numpy(np.concatenate(parts))
        own = np.array_split(np.arange(size), distributed.get_world_size())[distributed.get_rank()]
        whole = Batch(len(views) * size, {}, rows)
        return cls(whole, size, own, 1) if len(own) else cls(whole, size, np.zeros(1, dtype=np.int64), 0)

    @property
    def rows(self) -> NDArray[np.int64]:
        """Rows of this process in the whole batch, view after view."""
        views = self.whole.size // self.num_subjects
        return np.concatenate([number * self.num_subjects + self.subjects for number in range(views)])

    def add(self, own: Tensor) -> Tensor:
        """Add up a tensor over the processes; the gradient reaches this process's part."""
        part = own * self.weight
        total = part.detach().clone().contiguous()
        distributed.all_reduce(total)
        return part + (total - part.detach()) if part.requires_grad else total


class SpreadTrainer(Trainer):
    """A trainer that takes its steps together with those of the site's other processes."""

    def __init__(self, run: RunConfig, streams: Sequence[str] | None = None) -> None:
        super().__init__(run, streams)
        self.share: Share | None = None
        """Of the current step; None outside of steps."""
        self.experts = _SpreadExperts(self)

    def train(self, store: ImageStore, indices: NDArray[np.int64], **steps: Any) -> TrainResult:
        """Take steps on some subjects of a store as `Trainer.train` does, in all processes of torch's process group.

        The state of rank 0 is that of all, and its result that of the round.
        """
        self.take_state()
        of_round = {name: steps[name] for name in ("site", "round_number", "num_steps", "workers") if name in steps}
        on_step = steps.get("on_step") or (lambda *_: None)
        with closing(SpreadGradient(self, self.experts, self.training_inputs(store), indices, **of_round)) as source:
            for taken in range(steps["num_steps"]):
                with self._spread():
                    source.record(self.step(source, steps["first_step"] + taken, steps.get("profile")))
                on_step(taken + 1, source.loss.detach())
        source.gather_record()
        if distributed.get_rank():
            return source.result({}, {})
        last = self.views(source.last_whole())
        return source.result(*self._last_batch(last, with_monitors=steps.get("with_monitors", False)))

    def take_state(self) -> None:
        """Take the state of the process of rank 0."""
        frozen, shared, private = self.frozen_state(), self.shared_state(), self.private_state()
        for state in (frozen, shared, private):
            for name in sorted(state):
                distributed.broadcast(state[name], 0)
        if distributed.get_rank():
            if frozen:
                self.load_frozen(frozen)
            self.load_shared(shared)
            self.load_private(private)

    def teacher_forward(self, features: Batch, *, reads_saliency: bool) -> Encoded | None:
        """Run the teacher on this process's part of a batch; saliency counts the streams of the whole batch."""
        if self.share is None or not reads_saliency:
            return super().teacher_forward(features, reads_saliency=reads_saliency)
        with torch.no_grad():
            layout = replace(self.model.layout(features), presence=self.model.layout(self.share.whole).presence)
            saliency, keep_blocks = self.run.masking.saliency, self.objective.needs_teacher
            tokens = self.teacher.tokenize(features, layout)
            encoded: Encoded = self.teacher.backbone(tokens, layout, saliency=saliency, keep_blocks=keep_blocks)
            return encoded

    def mask(
        self, features: Batch, full: Encoded | None, relative: Tensor, number: int, generator: torch.Generator
    ) -> TokenMask:
        """Draw the mask of the whole batch, and take this process's rows."""
        if self.share is None or not self.run.objective.hides_tokens:
            return super().mask(features, full, relative, number, generator)
        if self.run.masking.steered_by == "subject":
            everyone = relative.new_zeros(self.share.whole.size, relative.shape[1])
            everyone[send(torch.from_numpy(self.share.rows), relative.device)] = relative
            relative = self.share.add(everyone)
        own = full.layout if full else self.model.layout(features)
        layout = self.model.layout(self.share.whole)
        whole = draw_mask(self.policy, relative, layout, self.model.stream_of_patch, step=number, generator=generator)
        hidden = torch.zeros_like(whole.layout.patch_index)
        hidden = hidden.scatter_add(1, whole.hidden_column, whole.hidden.valid.long()) > 0
        rows = send(torch.from_numpy(self.share.rows), hidden.device)
        return TokenMask.of(own, hidden[rows, : own.valid.shape[1]], whole.hidden.lengths()[self.share.rows])

    @contextmanager
    def _spread(self) -> Iterator[None]:
        batch_sums.add_processes, batch_sums.mean_of_processes = self._add, self._mean
        try:
            yield
        finally:
            batch_sums.add_processes = batch_sums.mean_of_processes = self.share = None

    def _add(self, own: Tensor) -> Tensor:
        assert self.share is not None
        return self.share.add(own)

    def _mean(self, values: Tensor, otherwise: Tensor | float) -> Tensor:
        total, count = self._add(values.sum(dim=0)), self._add(values.new_tensor(float(len(values))))
        return (total / count.clamp_min(1)).where(count > 0, otherwise)


class _SpreadExperts(ExpertTraining):
    """Draws the routers' noise for the whole batch, and takes this process's rows."""

    def __init__(self, trainer: SpreadTrainer) -> None:
        super().__init__(trainer.run.model.experts, trainer.model)
        self._trainer = weakref.proxy(trainer)

    def exploration(self, progress: float, generator: torch.Generator) -> Exploration | None:
        """The routers' noise at a point of the run, drawn from a generator."""
        own, share = super().exploration(progress, generator), self._trainer.share
        if own is None or share is None:
            return own
        rows = torch.from_numpy(share.rows)

        def draw(logits: Tensor) -> Tensor:
            units = len(logits) // len(rows)
            everyone = torch.randn(share.whole.size, units, logits.shape[1], generator=generator)
            return send(everyone[rows].flatten(0, 1), logits.device).to(logits.dtype)

        return Exploration(own.scale, draw)


class SpreadGradient(BatchGradient):
    """The gradient of the whole batch's mean loss, added up over the processes and clipped in each alike."""

    _state: SpreadTrainer

    def __init__(self, *words: Any, **of_round: Any) -> None:
        self._prepared_shares: dict[int, tuple[Share, Drawn]] = {}
        super().__init__(*words, **of_round)

    def draw(self) -> Iterator[DrawnBatch]:
        """Draw one batch, of which this process has its share."""
        for drawn in super().draw():
            self._state.share, self._last = self._prepared_shares.pop(len(self._batches))
            yield drawn

    def last_whole(self) -> DrawnBatch:
        """Read the last batch again, whole."""
        drawn = super()._prepare((len(self._batches) - 1, self._last))
        return replace(drawn, inputs=drawn.inputs.to(self._state.device))

    def _prepare(self, numbered: tuple[int, Drawn]) -> DrawnBatch:
        step, (subjects, views) = numbered
        share = Share.of(self._store, subjects, views)
        self._prepared_shares[step] = share, numbered[1]
        return super()._prepare((step, (subjects[share.subjects], views)))

    def add(self, output: StepOutput) -> None:
        """Take this process's part of the batch's mean loss and regularisers."""
        super().add(output)
        share, losses = self._share, output.losses
        if not share.weight:
            self._batches[-1] = []
        part = share.weight / share.num_subjects
        self.loss = share.add(losses.detach().sum() / share.num_subjects)
        has_loss = torch.tensor(int(losses.requires_grad))
        distributed.all_reduce(has_loss)
        if has_loss and self._experts.layers:
            losses = self._experts.align(losses, output.student.encoded)
            self._total = losses.sum() * part + self._experts.balance(output.student.encoded, output.progress)
        else:
            self._total = losses.sum() * part

    def finish(self) -> Tensor:
        """Compute the gradient, add it up and clip it; False as in `BatchGradient.finish`."""
        parameters = self._state.parameters
        self._state.optimiser.zero_grad()
        if self._total.requires_grad:
            self._total.backward()
        has_gradient = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        distributed.all_reduce(has_gradient, distributed.ReduceOp.MAX)
        moved = [parameter for parameter, has in zip(parameters, has_gradient.tolist(), strict=True) if has]
        if not moved:
            return torch.zeros((), dtype=torch.bool, device=self._total.device)
        own = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in moved]
        flat = torch.cat([gradient.reshape(-1) for gradient in own])
        distributed.all_reduce(flat)
        for parameter, gradient in zip(moved, flat.split([parameter.numel() for parameter in moved]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        return self._clip(self._share.add(self._total.detach()))

    def gate_mass(self) -> Mapping[str, Tensor]:
        """Gate mass of the whole batch by layer."""
        own = super().gate_mass()
        self._mass_of_step = {name: self._share.add(mass) for name, mass in own.items()}
        return self._mass_of_step

    def gather_record(self) -> None:
        """Bring the processes' records of the round together."""
        everyone: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyone, self._batches)
        self._batches = [[*chain.from_iterable(parts)] for parts in zip(*everyone, strict=True)]
        marks = self._contributors.marks.to(torch.uint8)
        distributed.all_reduce(marks, distributed.ReduceOp.MAX)
        self._contributors.marks = marks > 0

    @property
    def _share(self) -> Share:
        assert self._state.share is not None
        return self._state.share
