"""The supervised objective: its loss by hand, nothing between patients, whole images, the same bits after a resume, and
a private step whose clipping and noise are those of any other."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from panfm.config.parts import PlainPartsConfig
from panfm.config.task import TaskConfig
from panfm.errors import ConfigError
from panfm.models import build_model
from panfm.privacy.private_step import PrivateGradient, clipped_sum, gradient_parameters
from panfm.site.state import fingerprint
from panfm.training.objectives.supervised.objective import label_losses
from panfm.training.token_mask import has_loss
from panfm.training.trainer import Trainer
from tests.unit.config.test_task_config import OLD, PRIVATE

KINDS = '[task]\nlabel = "kind"\nkind = "classes"\nclasses = ["a", "b", "c"]\n'
HEAD = {"heads.task.weight", "heads.task.bias"}
NAN = math.nan


def labelled(store, outputs=1, seed=0):
    random = np.random.default_rng(seed)
    classes = random.integers(0, max(outputs, 2), len(store.subjects))
    labels = classes[:, None] if outputs == 1 else np.eye(outputs)[classes]
    return replace(store, labels=labels.astype(np.float32))


def train(trainer, store, round_number=1):
    everyone = np.arange(len(store.subjects))
    first = 4 * (round_number - 1)
    return trainer.train(store, everyone, first_step=first, num_steps=4, site="a", round_number=round_number)


def test_losses_by_hand():
    yes_no = TaskConfig(label="x", kind="yes-no")
    losses = label_losses(yes_no, torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([[1.0], [0.0], [NAN]]))
    assert_close(losses, torch.tensor([math.log(2.0), math.log1p(math.exp(2.0)), 0.0]))
    classes = TaskConfig(label="x", kind="classes", classes=("a", "b"))
    losses = label_losses(classes, torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 1.0]]))
    assert_close(losses, torch.tensor([math.log(4.0 / 3.0)]))
    number = TaskConfig(label="x", kind="number", centre=0.0, scale=1.0)
    assert_close(label_losses(number, torch.tensor([[3.0]]), torch.tensor([[1.0]])), torch.tensor([4.0]))


def test_an_unknown_label_has_no_gradient():
    outputs = torch.tensor([[1.0], [2.0]], requires_grad=True)
    label_losses(TaskConfig(label="x", kind="yes-no"), outputs, torch.tensor([[NAN], [1.0]])).sum().backward()
    assert outputs.grad[0] == 0.0
    assert outputs.grad[1] != 0.0


@pytest.mark.parametrize("pooling", ["cls+mean", "layers"])
@torch.no_grad()
def test_the_head_reads_the_embedding_of_the_whole_images(make_run, make_store, pooling):
    """Training computes the loss from a patient's embedding as `embed` gives it, whoever else is in the batch."""
    run = make_run(f'{KINDS}[features]\npooling = "{pooling}"\n')
    trainer, store = Trainer(run), labelled(make_store(run, 5), 3)
    trainer.model.heads.task.weight.normal_(generator=torch.Generator().manual_seed(0))
    features = trainer.model.patch_features(store.batch(np.arange(5)))
    mask, losses = trainer.unguided_losses(features, torch.Generator())
    assert has_loss(mask).all()
    outputs = trainer.model.heads.task(trainer.model.embed(store.batch(np.arange(5))))
    assert_close(losses, label_losses(run.task, outputs, torch.from_numpy(store.labels)), atol=1e-5, rtol=1e-5)
    for subject in range(5):
        alone = trainer.unguided_losses(trainer.model.patch_features(store.batch([subject])), torch.Generator())[1]
        assert_close(alone[0], losses[subject], atol=1e-5, rtol=1e-5)


def test_a_task_is_learned_and_counts_every_patient(make_run, make_store):
    run = make_run(OLD)
    trainer, store = Trainer(run), make_store(run, 12, complete=True)
    store = replace(store, labels=(store.images["brain-mr"].mean(axis=(1, 2, 3, 4)) > 0.5).astype(np.float32)[:, None])
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    results = [train(trainer, store, number) for number in (1, 2)]
    assert results[0].contributors_per_stream == dict.fromkeys(run.streams, 12)
    assert all(len(batch) == 6 for batch in results[0].batches)
    assert results[1].loss < results[0].loss <= math.log(2.0) + 0.05
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved >= HEAD
    assert not any(name.startswith("heads.") and name not in HEAD for name in moved)


@pytest.fixture
def head_only(make_run):
    """A run that trains the head alone, on augmented images."""
    run = make_run(KINDS + "[augment]\n")
    return run.model_copy(update={"train": run.train.model_copy(update={"parts": PlainPartsConfig(kind="head")})})


def test_parts_head_trains_the_head_alone_and_resumes_with_the_same_bits(head_only, make_store):
    store, trainer = labelled(make_store(head_only, 8), 3), Trainer(head_only)
    assert trainer.model.trained == HEAD
    train(trainer, store)
    frozen, shared, private = trainer.frozen_state(), trainer.shared_state(), trainer.private_state()
    assert shared.keys() == HEAD
    train(trainer, store, 2)
    resumed = Trainer(head_only)
    resumed.load_frozen(frozen)
    resumed.load_shared(shared)
    resumed.load_private(private)
    train(resumed, store, 2)
    assert torch.equal(resumed.model.heads.task.weight, trainer.model.heads.task.weight)


def test_a_sites_fingerprint_is_that_of_its_labels_too(make_run, make_store):
    store = labelled(make_store(make_run(OLD)))
    other = replace(store, labels=1.0 - store.labels)
    assert len({fingerprint(each) for each in (store, other, replace(store, labels=None))}) == 3


def test_a_model_without_a_head_of_a_task_is_refused(make_run):
    run = make_run(OLD).model_copy(update={"task": None})
    with pytest.raises(ConfigError, match="no head of a task"):
        Trainer(run)


def test_the_head_starts_at_zero_and_belongs_to_the_heads(make_run):
    model = build_model(make_run(KINDS))
    assert not model.heads.task.weight.any()
    assert {model.parameter_groups()[name] for name in HEAD} == {"head"}
    assert model.heads.task.weight.shape == (3, model.embedding_size)


def private_run(make_run, **changes):
    run = make_run(OLD + PRIVATE + "clip-norm = 0.7\n")
    return run.model_copy(update={"patient_dp": run.patient_dp.model_copy(update=changes)})


def test_a_private_step_clips_each_patient_whatever_its_label(make_run, make_store):
    """One patient more changes the sum by its own clipped gradient; an absurd label moves it by no more than that."""
    run = private_run(make_run)
    trainer, store = Trainer(run), labelled(make_store(run))
    labels = store.labels.copy()
    labels[3], labels[4] = 1e30, np.nan
    features = trainer.patch_features(replace(store, labels=labels))
    sums = [clipped_sum(trainer, features, np.array(sample)) for sample in ([0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 4])]
    for index, largest in ((1, 0.7), (2, 0.7), (3, 0.0)):
        moved = torch.cat([(sums[index][name] - sums[0][name]).flatten() for name in sums[0]]).norm()
        assert moved <= largest * (1 + 1e-5)
    assert sums[0].keys() == gradient_parameters(trainer.model).keys()
    assert not any(name.startswith("heads.") and name not in HEAD for name in sums[0])


def test_the_noise_of_a_private_step_has_the_stated_scale(make_run, make_store):
    """With no patient drawn, the gradient of all trained parameters is noise of deviation z C / (q N)."""
    trainer = Trainer(private_run(make_run))
    store = labelled(make_store(trainer.run))
    values = []
    for _ in range(6):
        source = PrivateGradient(trainer, store, np.arange(0))
        assert not list(source.draw())
        assert source.finish()
        values += [parameter.grad.flatten() for parameter in trainer.model.parameters() if parameter.grad is not None]
    drawn, stated = torch.cat(values).double(), 1.0 * 0.7 / (0.25 * 50)
    assert len(drawn) > 200_000
    assert drawn.std().item() == pytest.approx(stated, rel=0.008)  # five standard errors
    assert drawn.std().item() != pytest.approx(1.03 * stated, rel=0.008)
