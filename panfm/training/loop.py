"""The local loop: what one site does between two messages of the server.

Each step: draw patients, let the teacher see all they have, hide some tokens, let the student guess them, step, move
the teacher. Every draw comes from a generator derived from (run seed, site, round, purpose); schedules run over the
whole federation, not over the round.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from panfm.data.store import Batch, ImageStore
from panfm.errors import ConfigError
from panfm.models.backbone import Encoded, Exploration
from panfm.seeds import numpy_generator, torch_generator
from panfm.training.contributors import Contributors, has_loss
from panfm.training.experts import ExpertTraining
from panfm.training.masking import draw_hidden, is_guided, stream_scores
from panfm.training.objective import Split, View, masked_view
from panfm.training.saliency import relative_profile, stream_shares, streams_present
from panfm.training.schedules import cosine, warmup_cosine

if TYPE_CHECKING:
    from panfm.training.learner import Learner

_PROFILE_MOMENTUM = 0.9
"""Momentum per step of a site's running saliency profile."""


@dataclass(frozen=True)
class TrainResult:
    """What a round of local training amounts to."""

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
    """Subjects of each step that have something to guess, as indices into the store; not told of a private round, whose
    batches are secret, and neither is what follows."""
    counted: Sequence[int] = ()
    """Steps that were not left out, as indices into `batches`."""
    contributors_per_stream: Mapping[str, int] = field(default_factory=dict)
    """Distinct subjects behind a stream's part of the model in the steps that counted; see `contributors.py`."""
    contributors_per_expert: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Layer -> distinct subjects behind each of its experts in those steps."""


@dataclass(frozen=True)
class Validation:
    """Loss of subjects that were not trained on."""

    loss: float
    """Mean over the subjects; NaN without any."""
    subjects: int
    """Those of them that have something to guess."""


def train(
    learner: "Learner",
    store: ImageStore,
    indices: NDArray[np.int64],
    *,
    first_step: int,
    num_steps: int,
    site: str,
    round_number: int,
    profile: dict[str, float] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Take `num_steps` optimiser steps.

    Guarantees:
        skipped: a step whose loss or gradient is not finite leaves parameters, directors, teacher, running statistics
            and profile as they were, and is counted.

    Raises:
        ConfigError: the run is private, and this loop keeps no promise.

    Args:
        store: Stem maps of the site's subjects.
        indices: The subjects to train on.
        first_step: Local steps that the schedule has behind it.
        profile: The federation's saliency profile, relative to an equal split; used under scope `federation`.
        on_step: Called after each step with the number of steps taken and the loss.
    """
    run = learner.run
    if run.privacy is not None:
        raise ConfigError("privacy: a private run trains by panfm.privacy.train_privately, with a permit from a ledger")
    masks = torch_generator(run.seed, site, round_number, "masking")
    experts = ExpertTraining(run.model.experts, learner.model, torch_generator(run.seed, site, round_number, "routing"))
    order = batches(indices, run.train.batch_size, numpy_generator(run.seed, site, round_number, "order"))
    losses, batches_with_loss, counted = [], [], []
    num_experts = {name: len(layer.router.activation) for name, layer in learner.model.director_experts().items()}
    contributors = Contributors(len(store.subjects), len(learner.model.stream_names), num_experts)
    for taken in range(num_steps):
        position = (first_step + taken + 0.5) / run.train.total_steps
        chosen = next(order)
        maps = store.batch(chosen).to(learner.device)
        before = (learner.objective.state(), learner.profile)
        with _autocast(learner):
            full = _teach(learner, maps)
            relative = _guidance(learner, full, profile)
            split = hide(learner, maps, full, relative, first_step + taken, masks)
            batches_with_loss.append(chosen[has_loss(split)].tolist())
            view, each = _compare(learner, maps, full, split, experts.exploration(position))
            loss = each.mean()
            total = experts.regularise(loss, view.seen, position)
        if step(learner, total, position):
            experts.absorb(view.seen, position)
            contributors.add(chosen, split, view.seen, learner.model.stream_of_place)
            start, end = run.train.teacher_momentum
            learner.update_teacher(cosine(position, start=start, end=end))
            losses.append(loss.item())
            counted.append(taken)
        else:
            learner.objective.load_state(before[0])
            learner.profile = before[1]
        if on_step is not None:
            on_step(taken + 1, loss.item())
    return TrainResult(
        num_steps=num_steps,
        num_skipped=num_steps - len(losses),
        loss=float(np.mean(losses)) if losses else float("nan"),
        saliency=_saliency(learner, maps),
        subjects=len(indices),
        subjects_per_stream={name: int(np.isin(store.rows[name], indices).sum()) for name in store.images},
        gate_mass=experts.gate_mass(),
        batches=batches_with_loss,
        counted=counted,
        contributors_per_stream=dict(zip(learner.model.stream_names, contributors.per_stream(), strict=True)),
        contributors_per_expert=contributors.per_expert(),
    )


def hide(
    learner: "Learner",
    maps: Batch,
    full: Encoded | None,
    relative: torch.Tensor,
    steps_taken: int,
    masks: torch.Generator,
) -> Split:
    """Hide some places, more of the streams whose saliency `relative` ([B, S] or [1, S]) says so."""
    config, model = learner.run.masking, learner.model
    layout = full.layout if full else model.layout(maps)
    scores = stream_scores(config, relative, model.stream_organs, steps_taken)
    hidden = draw_hidden(config, scores, layout, model.stream_of_place, masks)
    return Split.of(layout, hidden)


def step(learner: "Learner", loss: torch.Tensor, position: float) -> bool:
    """One optimiser step; False, and no parameter changed, when loss or gradient is not finite, or nothing was hidden
    that the loss could ask for."""
    if not loss.requires_grad:
        return False
    config = learner.run.train
    for group in learner.optimiser.param_groups:
        group["lr"] = config.learning_rate * warmup_cosine(position, warmup=config.warmup)
    learner.optimiser.zero_grad()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([each.grad for each in learner.parameters if each.grad is not None])
    if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
        return False
    if norm > config.clip_norm:
        torch.nn.utils.clip_grads_with_norm_(learner.parameters, config.clip_norm, norm)
    learner.optimiser.step()
    learner.pull_back(group["lr"] * config.proximal_mu)
    return True


@torch.no_grad()
def validate(learner: "Learner", store: ImageStore, indices: NDArray[np.int64], *, site: str) -> Validation:
    """Mean loss of subjects under one fixed, unguided mask, the same in every round.

    Subjects that hold none of the trained streams are left out.
    """
    held = [store.rows[name] for name in learner.model.stream_names if name in store.rows]
    indices = indices[np.isin(indices, np.concatenate(held))] if held else indices[:0]
    if not len(indices):
        return Validation(float("nan"), 0)
    masks = torch_generator(learner.run.seed, site, "validation")
    state, unguided = learner.objective.state(), torch.ones_like(learner.profile)[None]
    losses, num_with_loss = [], 0
    for start in range(0, len(indices), learner.run.train.batch_size):
        maps = store.batch(indices[start : start + learner.run.train.batch_size]).to(learner.device)
        with _autocast(learner):
            full = _teach(learner, maps)
            split = hide(learner, maps, full, unguided, 0, masks)
            losses.append(_compare(learner, maps, full, split)[1])
        num_with_loss += int(has_loss(split).sum())
    learner.objective.load_state(state)
    return Validation(float(torch.cat(losses).mean()), num_with_loss)


def batches(indices: NDArray[np.int64], size: int, generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Endless shuffled batches: passes over the subjects, each in a new order; a rest smaller than a batch is left for
    another pass."""
    while True:
        order = generator.permutation(indices)
        for start in range(0, max(len(order) - size, 0) + 1, size):
            yield order[start : start + size]


def _compare(
    learner: "Learner", maps: Batch, full: Encoded | None, split: Split, exploration: Exploration | None = None
) -> tuple[View, torch.Tensor]:
    """What the student makes of a split batch, and each subject's loss [B]."""
    view = masked_view(learner.model, maps, split, exploration)
    targets = learner.objective.targets(learner.teacher, maps, split, full)
    return view, learner.objective.loss(learner.model, view, targets)


@torch.no_grad()
def _teach(learner: "Learner", maps: Batch) -> Encoded | None:
    """The teacher's encoding of everything, if objective or masking asks for it."""
    saliency = learner.run.masking.saliency if is_guided(learner.run.masking) else None
    if not saliency and not learner.objective.needs_teacher:
        return None
    return learner.teacher.encode(maps, saliency=saliency, keep_blocks=learner.objective.needs_teacher)


def _guidance(learner: "Learner", full: Encoded | None, profile: dict[str, float] | None) -> torch.Tensor:
    """Saliency that steers the masks, relative to an equal split: [B, S] or [1, S]. Moves the site's profile."""
    if not is_guided(learner.run.masking) or full is None:
        return torch.ones_like(learner.profile)[None]
    shares, present = stream_saliency(learner, full)
    scope = learner.run.masking.scope
    if scope == "subject":
        return shares * present.sum(dim=1, keepdim=True)
    relative, count = relative_profile(shares, present)
    moved = learner.profile.lerp(relative, 1.0 - _PROFILE_MOMENTUM)
    learner.profile = torch.where(count > 0, moved, learner.profile)
    if scope == "federation" and profile is not None:
        known = [profile.get(name, 1.0) for name in learner.model.stream_names]
        return torch.tensor([known], device=learner.device)
    return learner.profile[None]


def stream_saliency(learner: "Learner", full: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
    """Saliency of every stream [B, S], and which streams each subject has [B, S]."""
    assert full.saliency is not None
    places, num_streams = learner.model.stream_of_place, len(learner.model.stream_names)
    shares = stream_shares(full.saliency.float(), full.layout, places, num_streams)
    return shares, streams_present(full.layout, places, num_streams)


@torch.no_grad()
def _saliency(learner: "Learner", maps: Batch) -> dict[str, float]:
    if not learner.model.backbone.has_saliency:
        return {}
    full = learner.teacher.encode(maps, saliency=learner.run.masking.saliency)
    relative, count = relative_profile(*stream_saliency(learner, full))
    pairs = zip(learner.model.stream_names, relative.tolist(), count.tolist(), strict=True)
    return {name: value for name, value, num in pairs if num}


def _autocast(learner: "Learner") -> AbstractContextManager[None]:
    enabled = learner.device.type == "cuda" and learner.run.train.precision == "auto"
    return torch.autocast(learner.device.type, dtype=torch.bfloat16, enabled=enabled)
