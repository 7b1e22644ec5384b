"""Audit of the private step: one run with canaries, whose result bounds epsilon from below.

m patients are made up whose gradient points along an axis of its own, longer than the clip norm. A coin decides for
each whether it is among the patients; then T real steps run: Poisson sample, per-patient gradients, clipping, noise,
optimiser. From a canary's coordinate in the sum of all released steps, an attacker guesses whether it was there. The
m / 4 with the largest and the m / 4 with the smallest sums are guessed; v of r guesses right are too many for an
(epsilon, delta)-private step if

    P[Binomial(r, e^eps / (1 + e^eps)) >= v] + 2 m delta max_i P[v > Binomial >= v - i] / i  <  1 - confidence

so the smallest epsilon for which that is not so is a lower bound. A correct step gives about a fifth of its claim; one
without noise or clipping gives the most that r right guesses can prove. A bug that doubles a patient's weight stays
unseen: that is for the exact tests.

Source: Steinke, Nasr & Jagielski 2023, "Privacy Auditing with One (1) Training Run", Theorem 5.2 and Appendix D.
Shape legend: B patients of a chunk, m canaries.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor, nn

from panfm.config import RunConfig
from panfm.data.store import Batch, ImageStore
from panfm.errors import ConfigError
from panfm.models import PanModel
from panfm.models.backbone import Encoded
from panfm.privacy.mechanisms import Mechanism, epsilon
from panfm.privacy.private_step import PrivateGradient
from panfm.seeds import numpy_generator
from panfm.training.objectives.interface import Objective, StudentOutput, Targets
from panfm.training.token_mask import TokenMask
from panfm.training.trainer import Trainer

DELTA = 1e-5
"""Of the claim that is audited; the run's own delta is too large for as many canaries as this takes."""
_CONFIDENCE = 0.95
"""Of the lower bound."""
_RATE = 0.25
"""Chance of a canary to be in a step, instead of the run's."""
_LENGTH = 100.0
"""Norm of a canary's gradient, in clip norms."""
_NAME = "canaries"
"""Of the canaries' parameter among the heads, which are trained whichever part of the model is."""


@dataclass(frozen=True)
class StepAudit:
    """Result of the audit."""

    claim: float
    """Epsilon of these steps by the accountant, at `DELTA`."""
    lower_bound: float
    """Epsilon that the guesses prove; above the claim, the step does not do what it claims."""
    guesses: int
    correct: int
    canaries: int
    steps: int


def audit_step(run: RunConfig, *, canaries: int = 1000, steps: int = 40) -> StepAudit:
    """Audit the step of a private run, with its model, objective, clip norm and noise.

    Args:
        canaries: m; they hold the run's first stream.
        steps: T.
    Raises:
        ConfigError: the run is not private.
    """
    if run.patient_dp is None:
        raise ConfigError(f"{run.name}: patient-dp is missing, expected a private run")
    trainer, store = _trainer(run, canaries, steps)
    present = numpy_generator(run.seed, "canaries").random(canaries) < 0.5
    indices, seen = np.flatnonzero(present), torch.zeros(canaries, dtype=torch.float64)
    source, coordinates = PrivateGradient(trainer, store, indices), trainer.model.heads.get_parameter(_NAME)
    for taken in range(steps):
        trainer.step(source, taken)
        assert coordinates.grad is not None
        seen += coordinates.grad.double().cpu()
    correct, guesses = guess(seen.numpy(), present)
    noise = run.patient_dp.noise_multiplier
    claim = epsilon([Mechanism("gradients", ("updates",), run.patient_dp.clip_norm, noise, _RATE, steps)], DELTA)
    bound = lower_bound(guesses, correct, canaries, delta=DELTA, confidence=_CONFIDENCE)
    return StepAudit(claim, bound, guesses, correct, canaries, steps)


def guess(seen: NDArray[np.float64], present: NDArray[np.bool_]) -> tuple[int, int]:
    """Guess that the quarter with the largest sums is there, and that with the smallest is not -> (right, made)."""
    quarter = len(seen) // 4
    order = np.argsort(seen, kind="stable")
    right = int(present[order[-quarter:]].sum() + (~present[order[:quarter]]).sum())
    return right, 2 * quarter


def lower_bound(guesses: int, correct: int, canaries: int, *, delta: float, confidence: float) -> float:
    """Largest epsilon, to 0.0001, that this number of right guesses refutes; 0 if it refutes none."""
    low, high = 0.0, 20.0
    if _chance(guesses, correct, canaries, 0.0, delta) >= 1.0 - confidence:
        return 0.0
    while high - low > 1e-4:
        middle = 0.5 * (low + high)
        refuted = _chance(guesses, correct, canaries, middle, delta) < 1.0 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low


def _chance(guesses: int, correct: int, canaries: int, eps: float, delta: float) -> float:
    """Upper bound on the probability that an (eps, delta)-private step gives at least this many right guesses."""
    right = 1.0 / (1.0 + np.exp(-eps))
    tail = float(binom.sf(correct - 1, guesses, right))
    counts = np.arange(1, correct + 1)
    near = np.cumsum(binom.pmf(correct - counts, guesses, right)) / counts
    return min(tail + 2.0 * canaries * delta * float(near.max(initial=0.0)), 1.0)


def _trainer(run: RunConfig, canaries: int, steps: int) -> tuple[Trainer, ImageStore]:
    """A trainer whose model has a coordinate per canary, and the patch features of the canaries."""
    assert run.patient_dp is not None
    private = run.patient_dp.model_copy(update={"sample_rate": _RATE})
    train = run.train.model_copy(update={"rounds": 1, "local_steps": steps})
    stream = next(iter(run.streams))
    changed = {"patient_dp": private, "train": train, "augment": None}  # canaries are known by their patch features
    trainer = Trainer(run.model_copy(update=changed), [stream])
    trainer.model.heads.register_parameter(_NAME, nn.Parameter(torch.zeros(canaries, device=trainer.device)))
    config = run.streams[stream]
    pictures = numpy_generator(run.seed, "canary pictures").random((canaries, config.channels, *config.shape))
    names = tuple(f"canary-{number}" for number in range(canaries))
    images, rows = {stream: pictures.astype(np.float32)}, {stream: np.arange(canaries)}
    features = trainer.patch_features(ImageStore(names, ("train",) * canaries, images, rows))
    known = torch.from_numpy(np.asarray(features.images[stream]))
    trainer.objective = _WithCanaries(trainer.objective, stream, known, private.clip_norm)
    return trainer, features


class _WithCanaries(Objective):
    """The run's objective, plus a long gradient along the axis of the canary that a patient is."""

    def __init__(self, objective: Objective, stream: str, pictures: Tensor, clip_norm: float) -> None:
        self.inner = objective
        self.needs_teacher = objective.needs_teacher
        self.needs_predictions = objective.needs_predictions
        self.stream = stream
        self.pictures = pictures.flatten(1)
        self.length = _LENGTH * clip_norm

    def targets(self, teacher: PanModel, features: Batch, mask: TokenMask, full: Encoded | None) -> Targets:
        """Targets of the run's objective, and which canary each patient is, [B, m], by its picture."""
        own = features.images[self.stream].flatten(1).cpu()
        number = torch.cdist(own, self.pictures).argmin(dim=1)
        axis = nn.functional.one_hot(number, len(self.pictures)).float()
        return {
            **self.inner.targets(teacher, features, mask, full),
            "canary": axis.to(features.images[self.stream].device),
        }

    def loss(self, student: PanModel, output: StudentOutput, targets: Targets) -> Tensor:
        """Loss of each subject [B]."""
        inner = {name: value for name, value in targets.items() if name != "canary"}
        coordinates = student.heads.get_parameter(_NAME)
        losses = self.inner.loss(student, output, inner)
        return losses + self.length * (targets["canary"][: len(losses)] @ coordinates)

    def state(self) -> dict[str, Tensor]:
        """State of the run's objective."""
        return self.inner.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.inner.load_state(state)
