"""Terms that couple patients, switched on in the real models: each moves the sum of clipped gradients by more than C
when one patient goes, which is why it is refused. Switched off, nothing does.

Every term is added to the real loss of one patient, reading something of the others, as a batch loss would.
"""

import numpy as np
import pytest
import torch
from torch import nn

from panfm.data.store import ImageStore
from panfm.privacy.patient_sums import add_clipped, patient_gradient
from panfm.privacy.private_step import PrivateGradient, clipped_sum, gradient_parameters
from panfm.training.trainer import Trainer
from tests.cases import quick

NUM = 24
LEVEL = 1 + 1e-5
ACKNOWLEDGED = "acknowledge-broken-guarantee = true"


def norm(tensors):
    return torch.stack([value.double().square().sum() for value in tensors]).sum().sqrt().item()


def change(whole, rest, clip):
    """In clip norms."""
    return norm([whole[name] - rest[name] for name in whole]) / clip


def encoded(trainer, patient):
    """One patient's images through the model, nothing hidden."""
    return trainer.model.encode(patient.student.features)


def probabilities(trainer, patient):
    return torch.cat([routed.probs[0] for routed in encoded(trainer, patient).routed])


def features(trainer, patient):
    return nn.functional.normalize(encoded(trainer, patient).cls[0], dim=0)


def coupled_loss(kind, trainer, source, patient, row, batch):
    """A patient's loss, or a term that reads `batch`: what a batch would tell it."""
    if kind == "load-balance":  # R sum imp stopgrad(imp), the patient's share of it
        return 1e3 * (probabilities(trainer, patient) * batch["importance"]).sum()
    if kind == "koleo":  # -log of the distance to the nearest other
        distance = (features(trainer, patient) - batch["features"]).square().sum(1)
        own = torch.eye(len(distance))[row]
        return -0.5 * (distance + 1e3 * own).min().log()
    if kind == "batch-norm":
        raw = (encoded(trainer, patient).cls[0] - batch["mean"]) / (batch["deviation"] + 1e-4)
        return raw.square().mean()
    own = source.loss(patient)
    return own * patient.student.mask.hidden.patch_index.numel() / batch["hidden"] if kind == "tokens" else own


@torch.no_grad()
def read_of_batch(kind, trainer, patients):
    """What the term takes from the batch, without gradient."""
    if kind == "load-balance":
        return {"importance": torch.stack([probabilities(trainer, one) for one in patients]).mean(0)}
    if kind == "koleo":
        return {"features": torch.stack([features(trainer, one) for one in patients])}
    if kind == "batch-norm":
        raw = torch.stack([encoded(trainer, one).cls[0] for one in patients])
        return {"mean": raw.mean(0), "deviation": raw.std(0)}
    return {"hidden": sum(one.student.mask.hidden.patch_index.numel() for one in patients)}


def total(kind, trainer, store, indices, clip):
    """Sum of clipped per-patient gradients with a term switched on."""
    trained = gradient_parameters(trainer.model)
    summed = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in trained.items()}
    source = PrivateGradient(trainer, store, indices, lambda _: torch.Generator().manual_seed(0))
    patients = [trainer.forward(batch, 0) for batch in source.patients(indices)]
    batch = read_of_batch(kind, trainer, patients)
    for row, patient in enumerate(patients):
        loss = coupled_loss(kind, trainer, source, patient, row, batch)
        add_clipped(summed, patient_gradient(loss, trained), clip)
    return summed


@pytest.fixture
def odd_one_out(make_store):
    """Patients who hold all streams; the first is far from all others, the last lies amid them."""

    def make(run, num=NUM):
        store = make_store(run, num, complete=True)
        for images in store.images.values():
            images[-1] = images[1:-1].mean(axis=0)
            images[0] = 40.0 * images[0] ** 3
        return store

    return make


def changes(summed, clip, leaving):
    """How far the sum moves, in clip norms, when each of some patients goes."""
    whole = summed(np.arange(NUM))
    return [change(whole, summed(np.delete(np.arange(NUM), each)), clip) for each in leaving]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "at_least"), [("none", 0.0), ("load-balance", 1.05), ("koleo", 1.3), ("batch-norm", 2.0)]
)
def test_a_term_that_reads_the_batch(make_private, odd_one_out, fixed_masks, kind, at_least):
    clip = 1e-3
    trainer = Trainer(make_private("mae", "dex", clip=clip))
    store = odd_one_out(trainer.run)
    if kind == "koleo":  # the last is everybody's nearest neighbour
        for images in store.images.values():
            images[:-1] = images[-1] + 0.1 * (images[:-1] - images[-1])
    store = trainer.patch_features(store)
    found = changes(lambda indices: total(kind, trainer, store, indices, clip), clip, (0, NUM - 1))
    check(max(found), at_least)


def check(found, at_least):
    """More than C with the term; C, and nearly met, without."""
    assert found > at_least
    assert at_least > 1.0 or 0.95 < found <= LEVEL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "at_least"),
    [
        ('name = "dino"\ncentre-momentum = 0.9\nteacher-temperature = 0.001', 1.1),
        ('name = "dino"\ncentre-momentum = 1.0\nteacher-temperature = 0.001', 0.0),
        ('name = "latent"\nstandardise = true', 2.0),
        ('name = "latent"\nstandardise = false', 0.0),
    ],
    ids=["centre", "no-centre", "moments", "no-moments"],
)
def test_running_statistics_of_the_targets(make_private, odd_one_out, fixed_masks, objective, at_least):
    """DINO's centre, which at momentum 1 stays where it is, and the latent targets' moments."""
    clip = 1e-3
    run = make_private(f"[objective]\n{objective}\n", clip=clip, more=ACKNOWLEDGED)
    trainer = Trainer(run)
    store = trainer.patch_features(odd_one_out(run))
    state = trainer.objective.state()

    def summed(indices):
        trainer.objective.load_state(state)
        return clipped_sum(trainer, store, indices, 0)

    found = changes(summed, clip, (0,))
    check(max(found), at_least)


@pytest.mark.parametrize(("kind", "at_least"), [("none", 0.0), ("tokens", 1.5)])
def test_a_mean_over_all_hidden_tokens_of_the_batch(make_private, make_store, fixed_masks, kind, at_least):
    """One patient holds all streams, three one: with the first gone, the others' tokens weigh more."""
    run = make_private("mae")
    trainer = Trainer(run)
    whole = make_store(run, 4, complete=True)
    rows = {name: np.arange(4 if name == "heart-ct" else 1) for name in run.streams}
    images = {name: whole.images[name][: len(rows[name])] for name in run.streams}
    store = trainer.patch_features(ImageStore(whole.subjects, whole.splits, images, rows))
    alone = total(kind, trainer, store, np.array([1]), 1e9)
    clip = norm(alone.values()) / (3 if kind == "tokens" else 10)
    sums = [total(kind, trainer, store, indices, clip) for indices in (np.arange(4), np.arange(1, 4))]
    check(change(*sums, clip), at_least)


@pytest.mark.parametrize(("num_steps", "at_least"), quick([(0, 0.0), (5, 1.5)], 1))
def test_experts_trained_outside_the_private_step(make_private, odd_one_out, fixed_masks, num_steps, at_least):
    """They never leave the site, but every shared gradient goes through them."""
    clip = 1e-3
    run = make_private("mae", "dex", clip=clip)
    store = odd_one_out(run)

    def summed(indices):
        trainer = Trainer(run)
        trainer.patch_features(store)
        own = {name: p for name, p in trainer.model.named_parameters() if ".experts." in name}
        for _ in range(num_steps):
            gradients = total("none", trainer, trainer.patch_features(store), indices, 1e9)
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter -= 0.02 * gradients[name].sign().float()
        found = total("none", trainer, trainer.patch_features(store), indices, clip)
        return {name: value for name, value in found.items() if name not in own}

    found = changes(summed, clip, (0,))
    check(max(found), at_least)
