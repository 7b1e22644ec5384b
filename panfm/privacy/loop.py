"""The private local loop: `panfm.training.loop` with a step that keeps the guarantee.

    g = (sum_j clip(g_j, C) + N(0, (z C)^2)) / (q N)

over a Poisson sample of the patients; q and N are public. Then AdamW and the teacher move as ever: what is computed
from g alone costs no more privacy. A sample may be empty; its step is noise, and counts. Losses stay unseen.

Patients are taken one at a time (`gradients.py` says why), each with a secret generator of its own for mask and
routers' noise, and as many hidden tokens as all have who hold the same streams. Masks are steered by the patient's own
saliency or by the site's noised one, never by the batch. Who used which expert is not counted: directors follow all
experts alike.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panfm.data.store import Batch, ImageStore
from panfm.errors import LedgerError
from panfm.models.backbone import Encoded
from panfm.privacy.gradients import add_clipped, patient_gradient
from panfm.privacy.ledger import Permit
from panfm.privacy.mechanisms import needs_saliency, planned
from panfm.privacy.patients import Patient, one_patient, patient_loss, patients_with_streams
from panfm.privacy.randomness import poisson_sample, secret_generator, with_noise
from panfm.privacy.saliency import noisy_profile
from panfm.privacy.trained import trained_parameters
from panfm.training import Learner, TrainResult
from panfm.training.experts import ExpertTraining
from panfm.training.loop import hide, stream_saliency
from panfm.training.masking import is_guided
from panfm.training.schedules import cosine, warmup_cosine


def train_privately(
    learner: Learner,
    store: ImageStore,
    indices: NDArray[np.int64],
    *,
    permit: Permit,
    first_step: int,
    num_steps: int,
    profile: dict[str, float] | None = None,
    on_step: Callable[[int], None] = lambda _: None,
) -> TrainResult:
    """Take `num_steps` private steps.

    Guarantees:
        paid: it runs once per permit, and a permit is made only by writing the round into a ledger.
        closed: parameters, private state and result depend on patients through the permit's mechanisms alone.

    Args:
        store: Images of the site's subjects.
        indices: The subjects to train on.
        permit: From `Ledger.spend`.
        first_step: Local steps that the schedule has behind it.
        profile: The federation's saliency profile; used under scope `federation`.
        on_step: Called after each step with the number of steps taken.
    Raises:
        LedgerError: the permit is for other mechanisms, or was used before.
    """
    run, store = learner.run, learner.stem(store)
    if planned(run) != permit.mechanisms or num_steps != run.train.local_steps:
        raise LedgerError("permit: for other mechanisms than this run's, expected one from Ledger.spend for this round")
    permit.use()
    for taken in range(num_steps):
        gradient = noisy_gradient(learner, store, indices, first_step + taken, profile)
        step(learner, gradient, _position(learner, first_step + taken))
        on_step(taken + 1)
    if needs_saliency(run):
        learner.profile = noisy_profile(learner, store, indices)
    return _result(learner, num_steps)


def noisy_gradient(
    learner: Learner,
    store: ImageStore,
    indices: NDArray[np.int64],
    steps_taken: int,
    profile: dict[str, float] | None = None,
) -> dict[str, Tensor]:
    """The noised mean gradient of one step, float32, per trained parameter."""
    private = learner.run.privacy
    assert private is not None
    sample = poisson_sample(indices, private.sample_rate)
    total = sum_over(learner, store, sample, steps_taken, profile)
    scale, size = private.noise_multiplier * private.clip_norm, private.sample_rate * private.public_subjects
    return {name: (with_noise(value, scale) / size).float() for name, value in total.items()}


def secret_draws(_: int) -> torch.Generator:
    """A generator for one patient in one step, which nobody can repeat."""
    return secret_generator()


def sum_over(
    learner: Learner,
    store: ImageStore,
    sample: NDArray[np.int64],
    steps_taken: int,
    profile: dict[str, float] | None = None,
    draws: Callable[[int], torch.Generator] = secret_draws,
) -> dict[str, Tensor]:
    """Sum of clipped gradients of the subjects in a sample, float64 on the CPU; zero for none.

    Args:
        draws: The generator of a subject's mask and routers' noise; other than by default in tests alone.
    """
    private = learner.run.privacy
    assert private is not None
    trained = trained_parameters(learner.model, private.trained)
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in trained.items()}
    for index in patients_with_streams(store, sample, learner.model.stream_names):
        maps = one_patient(store, int(index), learner.device)
        patient = prepare(learner, maps, steps_taken, profile, draws(int(index)))
        add_clipped(total, patient_gradient(patient_loss(learner, patient), trained), private.clip_norm)
    return {name: value.cpu() for name, value in total.items()}


@torch.no_grad()
def prepare(
    learner: Learner, maps: Batch, steps_taken: int, profile: dict[str, float] | None, generator: torch.Generator
) -> Patient:
    """Mask and targets of a batch of one patient.

    Args:
        generator: The patient's own; draws the mask and the routers' noise.
    """
    objective, masking = learner.objective, learner.run.masking
    steered = is_guided(masking) and masking.scope == "subject"
    full = None
    if objective.needs_teacher or steered:
        saliency = masking.saliency if steered else None
        full = learner.teacher.encode(maps, saliency=saliency, keep_blocks=objective.needs_teacher)
    split = hide(learner, maps, full, _steering(learner, full, profile), steps_taken, generator)
    targets = objective.targets(learner.teacher, maps, split, full)
    experts = ExpertTraining(learner.run.model.experts, learner.model, generator)
    return Patient(maps, split, targets, experts, _position(learner, steps_taken))


def step(learner: Learner, gradient: Mapping[str, Tensor], position: float) -> None:
    """Move student and teacher by a noised gradient; parameters without one stay."""
    config = learner.run.train
    for group in learner.optimiser.param_groups:
        group["lr"] = config.learning_rate * warmup_cosine(position, warmup=config.warmup)
    for name, parameter in learner.model.named_parameters():
        parameter.grad = gradient[name].to(parameter.device) if name in gradient else None
    learner.optimiser.step()
    for layer in learner.model.director_experts().values():
        momentum = _at(learner.run.model.experts.director_momentum, position)
        layer.move_director(torch.ones_like(layer.router.activation), momentum=momentum)
    learner.update_teacher(_at(config.teacher_momentum, position))


def _position(learner: Learner, steps_taken: int) -> float:
    return (steps_taken + 0.5) / learner.run.train.total_steps


def _at(ends: tuple[float, float], position: float) -> float:
    return cosine(position, start=ends[0], end=ends[1])


def _steering(learner: Learner, full: Encoded | None, profile: dict[str, float] | None) -> Tensor:
    """Saliency that steers the masks, relative to an equal split: [B, S] or [1, S]."""
    scope = learner.run.masking.scope
    if scope == "subject" and full is not None and full.saliency is not None:
        shares, present = stream_saliency(learner, full)
        return shares * present.sum(dim=1, keepdim=True)
    if scope == "federation" and profile is not None:
        return torch.tensor([[profile.get(name, 1.0) for name in learner.model.stream_names]], device=learner.device)
    return learner.profile[None]


def _result(learner: Learner, num_steps: int) -> TrainResult:
    """What may be told of the round: public numbers, and the noised profile where there is one."""
    private = learner.run.privacy
    assert private is not None
    names = learner.model.stream_names
    most = min(private.public_subjects, learner.run.train.batch_size)  # what the server lets a site weigh
    expected = min(private.sample_rate * private.public_subjects, most) * num_steps
    layers = learner.model.director_experts()
    return TrainResult(
        num_steps=num_steps,
        num_skipped=0,
        loss=float("nan"),
        saliency=dict(zip(names, learner.profile.tolist(), strict=True)) if needs_saliency(learner.run) else {},
        subjects=private.public_subjects,
        subjects_per_stream=dict.fromkeys(names, private.public_subjects),
        gate_mass={
            name: [expected / len(layer.router.activation)] * len(layer.router.activation)
            for name, layer in layers.items()
        },
    )
