"""The trainer: the local training that one site does between two messages of the server.

`Trainer.step` and `Trainer.forward` have one step in its order: draw patients, draw views of them, teacher forward,
mask, student forward, loss, gradient, optimiser, teacher update. A gradient source draws the patients and turns their
losses into a gradient (`gradient.py`). Schedules run over the whole federation, not over the round.

Shape legend: B subjects, S streams.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panfm.config import RunConfig
from panfm.data.store import Batch, ImageStore, join_batches, send
from panfm.errors import ConfigError
from panfm.models.backbone import Encoded, Exploration
from panfm.seeds import torch_generator
from panfm.training.draw_order import validation_order
from panfm.training.experts import ExpertTraining
from panfm.training.gradient import BatchGradient, DrawnBatch, GradientSource, StepOutput, TrainResult
from panfm.training.objectives.interface import StudentOutput, student_output
from panfm.training.saliency import relative_profile, stream_shares, streams_present
from panfm.training.schedules import cosine, learning_rate, progress_of
from panfm.training.token_mask import TokenMask, build_policy, draw_mask, has_loss
from panfm.training.training_state import TrainingState

_PROFILE_MOMENTUM = 0.9
"""Momentum per step of a site's running saliency profile."""


@dataclass(frozen=True)
class Validation:
    """Loss of subjects that were not trained on."""

    loss: float
    """Mean over the subjects; NaN without any."""
    subjects: int
    """Number of these subjects that have hidden tokens to predict."""


class Trainer(TrainingState):
    """A training state, and the steps that move it."""

    def __init__(self, run: RunConfig, streams: Sequence[str] | None = None) -> None:
        super().__init__(run, streams)
        self.policy = build_policy(run.masking, self.model.stream_organs)
        self.experts = ExpertTraining(run.model.experts, self.model)

    def train(
        self,
        store: ImageStore,
        indices: NDArray[np.int64],
        *,
        first_step: int,
        num_steps: int,
        site: str,
        round_number: int,
        profile: Mapping[str, float] | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
        with_monitors: bool = False,
        workers: int = 0,
    ) -> TrainResult:
        """Take `num_steps` plain steps on some subjects of a store.

        Raises:
            ConfigError: the run is private, and plain steps keep no promise.

        Args:
            indices: The subjects to train on.
            first_step: Local steps that the schedule has behind it.
            profile: The federation's saliency profile, relative to an equal split; used under scope `federation`.
            on_step: Called after each step with the number of steps taken and the loss, on the device: who reads it
                waits for the step.
            with_monitors: Compute the monitors of the last batch; the training is the same.
            workers: Threads that prepare batches of images ahead of their steps; the training is the same.
        """
        if self.run.patient_dp is not None:
            raise ConfigError(
                "patient-dp: a private run trains by panfm.privacy.private_step.train_privately, with a ledger's permit"
            )
        inputs = self.training_inputs(store)
        of_round: dict[str, Any] = {"site": site, "round_number": round_number, "num_steps": num_steps}
        with closing(BatchGradient(self, self.experts, inputs, indices, **of_round, workers=workers)) as source:
            for taken in range(num_steps):
                source.record(self.step(source, first_step + taken, profile))
                if on_step is not None:
                    on_step(taken + 1, source.loss.detach())
        return source.result(*self._last_batch(source.output.student.features, with_monitors=with_monitors))

    def step(self, source: GradientSource, number: int, profile: Mapping[str, float] | None = None) -> Tensor:
        """Take local step `number`, counted from the start of the run; returns whether it counts, a bool on the device.

        Guarantees:
            skipped: a step whose loss or gradient is not finite leaves parameters, directors, teacher, running
                statistics and profile as they were, and does not count.
            no wait: nothing in a plain step asks the device for a number, so the CPU can be steps ahead of it.
        """
        statistics, own_profile = self.objective.state(), self.profile
        for batch in source.draw():
            with _autocast(self):
                source.add(self.forward(batch, number, profile, moves_profile=source.moves_profile))
        counts = source.finish()
        moved = self.objective.state().items()
        self.objective.load_state({name: torch.where(counts, value, statistics[name]) for name, value in moved})
        self.profile = torch.where(counts, self.profile, own_profile)
        self.update(self.progress(number), source.gate_mass(), counts)
        return counts

    def forward(
        self, batch: DrawnBatch, number: int, profile: Mapping[str, float] | None = None, *, moves_profile: bool = False
    ) -> StepOutput:
        """Compute the losses of a drawn batch.

        Args:
            moves_profile: Whether the batch's saliency moves the site's profile.
        """
        progress, steered_by = self.progress(number), self.run.masking.steered_by
        features = self.views(batch)
        reads_saliency = steered_by is not None if moves_profile else steered_by == "subject"
        full = self.teacher_forward(features, reads_saliency=reads_saliency)
        relative = self._steering(full, profile, moves_profile=moves_profile)
        mask = self.mask(features, full, relative, number, batch.masks)
        exploration = self.experts.exploration(progress, batch.routing)
        output = self.student_forward(features, mask, exploration)
        return StepOutput(batch, output, self.losses(output, full), progress)

    def views(self, batch: DrawnBatch) -> Batch:
        """Patch features of the views of a batch's subjects, all of the first view, then all of the second."""
        shown = (batch.inputs.only(streams) for streams in batch.views)
        if self.augmentation is None:
            return join_batches(list(shown))
        with torch.autocast(self.device.type, enabled=False):
            varied = [self.augmentation.vary(view, batch.augmentation) for view in shown]
            return self.model.patch_features(join_batches(varied))

    @torch.no_grad()
    def teacher_forward(self, features: Batch, *, reads_saliency: bool) -> Encoded | None:
        """The teacher's encoding of all tokens, if objective or masking needs it."""
        if not reads_saliency and not self.objective.needs_teacher:
            return None
        saliency = self.run.masking.saliency if reads_saliency else None
        return self.teacher.encode(features, saliency=saliency, keep_blocks=self.objective.needs_teacher)

    def mask(
        self, features: Batch, full: Encoded | None, relative: Tensor, number: int, generator: torch.Generator
    ) -> TokenMask:
        """Draw which tokens are hidden, given the saliency of the streams `relative` to an equal split
        ([B, S] or [1, S]); none where the objective hides none."""
        layout = full.layout if full else self.model.layout(features)
        if not self.run.objective.hides_tokens:
            return TokenMask.whole(layout)
        return draw_mask(self.policy, relative, layout, self.model.stream_of_patch, step=number, generator=generator)

    def student_forward(
        self, features: Batch, mask: TokenMask, exploration: Exploration | None = None
    ) -> StudentOutput:
        """The student's encoding of the visible tokens and, if the objective asks for them, its predictions."""
        predicts = self.objective.needs_predictions
        return student_output(self.model, features, mask, exploration, predicts=predicts)

    def losses(self, output: StudentOutput, full: Encoded | None) -> Tensor:
        """The objective's loss of each subject [B]."""
        targets = self.objective.targets(self.teacher, output.features, output.mask, full)
        return self.objective.loss(self.model, output, targets)

    def update(
        self, progress: float, gate_mass: Mapping[str, Tensor] | None = None, counts: Tensor | None = None
    ) -> None:
        """Move student, directors and teacher by the gradient in the parameters' `.grad`.

        Args:
            gate_mass: Of the step's patients, by layer with experts; directors follow all experts alike without.
            counts: Whether to move them at all, a bool on the device; they move when left out.
        """
        config = self.run.train
        counts = torch.ones((), dtype=torch.bool, device=self.device) if counts is None else counts
        rate = learning_rate(config, progress)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimiser.found_inf = (~counts).float()  # type: ignore[attr-defined]  # the fused kernel then moves nothing
        self.optimiser.step()
        self.proximal_step(rate * config.proximal_mu, counts)
        self.experts.after_step(gate_mass, progress, counts)
        start, end = config.teacher_momenta
        self.update_teacher(cosine(progress, start=start, end=end), counts)

    def progress(self, number: int) -> float:
        """Share of the run, in [0, 1], at the middle of a local step."""
        return progress_of(self.run.train, number)

    @torch.no_grad()
    def validate(self, store: ImageStore, indices: NDArray[np.int64], *, site: str) -> Validation:
        """Mean loss of subjects under one fixed, unguided mask, the same in every round.

        Subjects that hold none of the trained streams are left out.
        """
        store = self.patch_features(store)
        masks, statistics = torch_generator(self.run.seed, site, "validation"), self.objective.state()
        losses, has_hidden = [], np.zeros(len(store.subjects), dtype=bool)
        for subjects, streams in validation_order(self.run, self.model.stream_names, store, indices):
            features = store.batch(subjects, streams).to(self.device)
            with _autocast(self):
                mask, batch_losses = self.unguided_losses(features, masks)
            losses.append(batch_losses)
            has_hidden[subjects] |= has_loss(mask, self.run.objective.num_views)
        self.objective.load_state(statistics)
        return Validation(float(torch.cat(losses).mean()) if losses else float("nan"), int(has_hidden.sum()))

    def unguided_losses(self, features: Batch, masks: torch.Generator) -> tuple[TokenMask, Tensor]:
        """A mask that no saliency steers, and each subject's loss [B] under it; nothing is augmented, the routers do
        not explore."""
        features = join_batches([features] * self.run.objective.num_views)
        full = self.teacher_forward(features, reads_saliency=False)
        mask = self.mask(features, full, torch.ones_like(self.profile)[None], 0, masks)
        return mask, self.losses(self.student_forward(features, mask), full)

    def stream_saliency(self, full: Encoded) -> tuple[Tensor, Tensor]:
        """Saliency of every stream [B, S], and which streams each subject has [B, S]."""
        assert full.saliency is not None
        stream_of_patch, num_streams = self.model.stream_of_patch, len(self.model.stream_names)
        shares = stream_shares(full.saliency.float(), full.layout, stream_of_patch, num_streams)
        return shares, streams_present(full.layout, stream_of_patch, num_streams)

    def _steering(self, full: Encoded | None, profile: Mapping[str, float] | None, *, moves_profile: bool) -> Tensor:
        """Saliency that steers the masks, relative to an equal split: [B, S] or [1, S]."""
        steered_by = self.run.masking.steered_by
        if steered_by is None:
            return torch.ones_like(self.profile)[None]
        if steered_by == "subject":
            assert full is not None
            shares, present = self.stream_saliency(full)
            return shares * present.sum(dim=1, keepdim=True)
        if moves_profile:
            assert full is not None
            relative, count = relative_profile(*self.stream_saliency(full))
            moved = self.profile.lerp(relative, 1.0 - _PROFILE_MOMENTUM)
            self.profile = torch.where(count > 0, moved, self.profile)
        if steered_by == "federation" and profile is not None:
            known = [profile.get(name, 1.0) for name in self.model.stream_names]
            return send(torch.tensor([known]), self.device)
        return self.profile[None]

    @torch.no_grad()
    def _last_batch(self, features: Batch, *, with_monitors: bool) -> tuple[dict[str, float], dict[str, float]]:
        """Saliency of the streams in a batch, relative to an equal split and empty if the backbone has none; and
        monitors of the teacher's features, if they are asked for. Nothing is drawn."""
        has_saliency = self.model.backbone.has_saliency
        if not (has_saliency or with_monitors):
            return {}, {}
        full = self.teacher.encode(features, saliency=self.run.masking.saliency if has_saliency else None)
        monitors = self._monitors(full) if with_monitors else {}
        if not has_saliency:
            return {}, monitors
        relative, count = relative_profile(*self.stream_saliency(full))
        pairs = zip(self.model.stream_names, relative.tolist(), count.tolist(), strict=True)
        return {name: value for name, value, num in pairs if num}, monitors

    def _monitors(self, full: Encoded) -> dict[str, float]:
        from panfm.training.monitors import feature_monitors  # a site that keeps monitors to itself does without

        return feature_monitors(full.cls.float().cpu().numpy()) | self.objective.monitors(self.teacher, full)


def _autocast(trainer: Trainer) -> AbstractContextManager[None]:
    """bf16 where the description allows it; private steps are float32."""
    config = trainer.run
    enabled = trainer.device.type == "cuda" and config.train.precision == "auto" and config.patient_dp is None
    return torch.autocast(trainer.device.type, dtype=torch.bfloat16, enabled=enabled)
