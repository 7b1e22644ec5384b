"""The private gradient source: the trainer's step then keeps the guarantee.

    g = (sum_j clip(g_j, C) + N(0, (z C)^2)) / (q N)

over a Poisson sample of the patients; q and N are public. Then AdamW and the teacher move as in any step: what is
computed from g alone costs no more privacy. A sample may be empty; its step is noise, and counts. No loss is released.

Patients are taken one at a time (`patient_sums.py` says why), each with a secret generator of its own for mask and
routers' noise, and as many hidden tokens as all have who hold the same streams. Masks are steered by the patient's own
saliency or by the site's noised one, never by the batch. Who used which expert is not counted: directors follow all
experts alike.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from panfm.data.store import ImageStore
from panfm.errors import LedgerError
from panfm.models import PanModel
from panfm.privacy.ledger import Permit
from panfm.privacy.mechanisms import needs_saliency, planned
from panfm.privacy.patient_sums import add_clipped, noisy_profile, one_patient, patient_gradient
from panfm.privacy.randomness import poisson_sample, secret_generator, with_noise
from panfm.training.gradient import DrawnBatch, StepOutput, TrainResult
from panfm.training.trainer import Trainer


def train_privately(
    trainer: Trainer,
    store: ImageStore,
    indices: NDArray[np.int64],
    *,
    permit: Permit,
    first_step: int,
    num_steps: int,
    profile: Mapping[str, float] | None = None,
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
    Raises:
        LedgerError: the permit is for other mechanisms, or was used before.
    """
    run = trainer.run
    if planned(run) != permit.mechanisms or num_steps != run.train.local_steps:
        raise LedgerError("permit: for other mechanisms than this run's, expected one from Ledger.spend for this round")
    permit.use()
    source = PrivateGradient(trainer, trainer.training_inputs(store), indices)
    for taken in range(num_steps):
        trainer.step(source, first_step + taken, profile)
    if needs_saliency(run.masking):
        trainer.profile = noisy_profile(trainer, trainer.patch_features(store), indices)
    return _result(trainer, num_steps)


def _secret_draws(_: int) -> torch.Generator:
    """Make a generator for one patient in one step, whose draws nobody can repeat."""
    return secret_generator()


class PrivateGradient:
    """The mean of clipped per-patient gradients over a Poisson sample, with noise."""

    moves_profile = False

    def __init__(
        self,
        trainer: Trainer,
        store: ImageStore,
        indices: NDArray[np.int64],
        draws: Callable[[int], torch.Generator] = _secret_draws,
    ) -> None:
        """Take the patients to sample from, of a store of training inputs (`TrainingState.training_inputs`).

        Args:
            draws: The generator of a patient's mask and routers' noise; other than by default in tests alone.
        """
        assert trainer.run.patient_dp is not None
        self.private = trainer.run.patient_dp
        self.parameters = gradient_parameters(trainer.model)
        self._trainer, self._store, self._indices, self._draws = trainer, store, indices, draws
        self._total: dict[str, Tensor] = {}

    def draw(self) -> Iterator[DrawnBatch]:
        """The patients of a Poisson sample, one by one."""
        return self.patients(poisson_sample(self._indices, self.private.sample_rate))

    def patients(self, sample: NDArray[np.int64]) -> Iterator[DrawnBatch]:
        """Begin a sum, of these patients; those without a stream of the model are left out."""
        self._total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in self.parameters.items()}
        streams = self._trainer.model.stream_names
        views = [streams] * self._trainer.run.objective.num_views
        for index in self._store.holders(sample, streams):
            generator = self._draws(int(index))
            inputs = one_patient(self._store, int(index), self._trainer.device, generator)
            yield DrawnBatch(np.array([index]), inputs, views, generator, generator, [generator])

    def add(self, output: StepOutput) -> None:
        """Add the clipped gradient of one patient's loss to the sum."""
        gradient = patient_gradient(self.loss(output), self.parameters)
        add_clipped(self._total, gradient, self.private.clip_norm)

    def loss(self, output: StepOutput) -> Tensor:
        """Loss of one patient, a number: the objective, and the experts' alignment."""
        return self._trainer.experts.align(output.losses, output.student.encoded).sum()

    def total(self) -> dict[str, Tensor]:
        """The sum of clipped gradients, float64 on the CPU; zero for no patient."""
        return {name: value.cpu() for name, value in self._total.items()}

    def finish(self) -> Tensor:
        """Leave the noised mean in the parameters' `.grad`; parameters that are not trained have none. Every step
        counts."""
        private = self.private
        scale, size = private.noise_multiplier * private.clip_norm, private.sample_rate * private.public_subjects
        noised = {name: (with_noise(value, scale) / size).float() for name, value in self.total().items()}
        self._trainer.set_gradient(noised)
        return torch.ones((), dtype=torch.bool, device=self._trainer.device)

    def gate_mass(self) -> None:
        """Return None: which patient used which expert must not be known."""


def clipped_sum(
    trainer: Trainer,
    store: ImageStore,
    sample: NDArray[np.int64],
    number: int = 0,
    profile: Mapping[str, float] | None = None,
    draws: Callable[[int], torch.Generator] = _secret_draws,
) -> dict[str, Tensor]:
    """The sum in a private step over a given sample, before noise; for audits and tests."""
    source = PrivateGradient(trainer, store, sample, draws)
    for batch in source.patients(sample):
        source.add(trainer.forward(batch, number, profile))
    return source.total()


def gradient_parameters(model: PanModel) -> dict[str, nn.Parameter]:
    """The parameters that a private run moves by gradients, by name, in the model's order.

    The others stay as the run started them, for instance pre-trained on public data: the fewer are trained, the less
    noise there is in all.
    """
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _result(trainer: Trainer, num_steps: int) -> TrainResult:
    """Summary of a private round: public numbers, and the noised profile where there is one."""
    private = trainer.run.patient_dp
    assert private is not None
    names = trainer.model.stream_names
    most = min(private.public_subjects, trainer.run.train.batch_size)  # what the server lets a site weigh
    expected = min(private.sample_rate * private.public_subjects, most) * num_steps
    layers = trainer.model.director_experts()
    return TrainResult(
        num_steps=num_steps,
        num_skipped=0,
        loss=float("nan"),
        saliency=dict(zip(names, trainer.profile.tolist(), strict=True)) if needs_saliency(trainer.run.masking) else {},
        subjects=private.public_subjects,
        subjects_per_stream=dict.fromkeys(names, private.public_subjects),
        gate_mass={
            name: [expected / len(layer.router.activation)] * len(layer.router.activation)
            for name, layer in layers.items()
        },
    )
