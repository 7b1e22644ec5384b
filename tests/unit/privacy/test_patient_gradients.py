"""The sum of clipped gradients: exact on the real models and losses, and moved by one patient by no more than C."""

import itertools

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from torch import nn
from torch.testing import assert_close

from panfm.data.store import ImageStore
from panfm.privacy.patient_sums import add_clipped, patient_gradient
from panfm.privacy.private_step import clipped_sum, gradient_parameters
from panfm.training.experts import ExpertTraining
from panfm.training.objectives.interface import student_output
from panfm.training.trainer import Trainer
from tests.cases import quick

KINDS = [(objective, backbone) for objective in ("latent", "mae") for backbone in ("dense", "dex")]
PARTS = ('kind = "vectors"\n', 'kind = "last-blocks"\nblocks = 1\n')
ACKNOWLEDGED = "acknowledge-broken-guarantee = true"


def norm(tensors):
    return torch.stack([value.double().square().sum() for value in tensors]).sum().sqrt().item()


@torch.no_grad()
def as_after_some_steps(trainer):
    """A teacher that is not the student, and experts that are neither alike nor their director's copies."""
    for parameter in trainer.teacher.parameters():
        parameter.mul_(1.1).add_(0.01)
    generator = torch.Generator().manual_seed(0)
    for layer in trainer.model.director_experts().values():
        for parameter in layer.experts.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def one_at_a_time(trainer, store, indices, hide, clip):
    """Plain autograd on batches of one, clipped and added up."""
    run, model = trainer.run, trainer.model
    experts = ExpertTraining(run.model.experts, model)
    trained = gradient_parameters(model)
    total = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in trained.items()}
    for index in indices:
        features = store.batch([index])
        full = trainer.teacher.encode(features, keep_blocks=True)
        split = hide(trainer, features, full, None, 0, None)
        view = student_output(model, features, split)
        targets = trainer.objective.targets(trainer.teacher, features, split, full)
        loss = trainer.objective.loss(model, view, targets).sum()
        if experts.layers:
            loss = loss + run.model.experts.alignment_weight * experts.alignment(view.encoded).sum()
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(trained.values(), found, strict=True)]
        factor = min(1.0, clip / norm(gradients))
        for name, gradient in zip(trained, gradients, strict=True):
            total[name] += factor * gradient.double()
    return total


@pytest.mark.parametrize(("objective", "backbone"), KINDS)
@pytest.mark.parametrize("clip", quick([0.05, 100.0], 1))
def test_the_sum_equals_a_loop_over_patients(make_private, every_subset, fixed_masks, objective, backbone, clip):
    run = make_private(objective, backbone, clip=clip)
    trainer = Trainer(run)
    as_after_some_steps(trainer)
    store = trainer.patch_features(every_subset(run))
    found = clipped_sum(trainer, store, np.arange(14), 0)
    expected = one_at_a_time(trainer, store, range(14), fixed_masks, clip)
    assert found.keys() == expected.keys()
    assert any(name.startswith("heads.") for name in found)
    difference = norm([found[name] - value for name, value in expected.items()])
    assert difference <= 1e-6 * max(norm(expected.values()), clip)


@pytest.mark.parametrize("backbone", ["dense", "dex"])
def test_activations_that_are_computed_again_give_the_same_bits(make_private, every_subset, fixed_masks, backbone):
    run = make_private(backbone=backbone)
    recomputed = run.model_copy(update={"train": run.train.model_copy(update={"activations": "recomputed"})})
    sums = []
    for each in (run, recomputed):
        trainer = Trainer(each)
        sums.append(clipped_sum(trainer, trainer.patch_features(every_subset(each, 1)), np.arange(7), 0))
    assert sums[0].keys() == sums[1].keys()
    assert all(torch.equal(sums[1][name], value) for name, value in sums[0].items())


@pytest.mark.parametrize("backbone", ["dense", "dex"])
@pytest.mark.parametrize("parts", PARTS)
def test_the_sum_over_a_part_of_the_parameters_is_clipped_by_that_part(
    make_private, every_subset, fixed_masks, parts, backbone
):
    run = make_private(backbone=backbone, clip=0.05, extra=f"[train.parts]\n{parts}")
    trainer = Trainer(run)
    as_after_some_steps(trainer)
    store = trainer.patch_features(every_subset(run, 1))
    found = clipped_sum(trainer, store, np.arange(7), 0)
    expected = one_at_a_time(trainer, store, range(7), fixed_masks, 0.05)
    assert found.keys() == expected.keys() < dict(trainer.model.named_parameters()).keys()
    assert norm([found[name] - value for name, value in expected.items()]) <= 1e-6 * norm(expected.values())
    assert norm(clipped_sum(trainer, store, np.arange(1), 0).values()) == pytest.approx(0.05, rel=1e-5)


@pytest.mark.parametrize(("objective", "backbone"), KINDS)
def test_one_patient_more_or_less_moves_the_sum_by_at_most_the_clip_norm(
    make_private, every_subset, fixed_masks, objective, backbone
):
    run = make_private(objective, backbone, clip=0.05)
    trainer = Trainer(run)
    store = trainer.patch_features(every_subset(run, 1))
    for change, from_others in leave_one_out(trainer, store):
        assert 0.049 < change <= 0.05 * (1 + 1e-5)  # met, so that a gradient that were too large would show
        assert from_others <= 1e-5 * 0.05


def leave_one_out(trainer, store):
    """How far the sum moves when a patient goes, and how much of that is not the patient's own gradient."""
    everyone, state = np.arange(len(store.subjects)), trainer.objective.state()

    def total(indices):
        trainer.objective.load_state(state)
        return clipped_sum(trainer, store, indices, 0)

    whole, found = total(everyone), []
    for index in (0, len(everyone) - 1):
        rest, own = total(np.delete(everyone, index)), total(everyone[index : index + 1])
        change = norm([whole[name] - rest[name] for name in whole])
        found.append((change, norm([whole[name] - rest[name] - own[name] for name in whole])))
    return found


SUBSETS = [held for size in (1, 2, 3) for held in itertools.combinations(("brain-mr", "heart-ct", "eye-fundus"), size)]


@pytest.mark.slow
@pytest.mark.parametrize("streams", SUBSETS, ids="+".join)
@pytest.mark.parametrize("backbone", ["dense", "dex"])
def test_a_site_of_any_subset_of_streams(make_private, every_subset, fixed_masks, backbone, streams):
    """Its model has these streams' parts only, and its patients any of them or none."""
    clip = 0.05
    run = make_private("latent", backbone, clip=clip)
    trainer = Trainer(run, streams)
    as_after_some_steps(trainer)
    store = trainer.patch_features(every_subset(run, 1))
    holders = sorted(set(np.concatenate([store.rows[name] for name in streams]).tolist()))
    found, expected = (
        clipped_sum(trainer, store, np.arange(7), 0),
        one_at_a_time(trainer, store, holders, fixed_masks, clip),
    )
    assert norm([found[name] - value for name, value in expected.items()]) <= 1e-6 * max(norm(expected.values()), clip)
    for gone in range(0, 7, 2):
        rest = clipped_sum(trainer, store, np.delete(np.arange(7), gone), 0)
        change = norm([found[name] - rest[name] for name in found])
        assert (0.99 * clip < change <= clip * (1 + 1e-5)) if gone in holders else change == 0.0


class SmallViT(nn.Module):
    """Patches, embeddings, attention, norms: what Opacus has samplers for, none of it a bare parameter."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 12, 4, stride=4)
        self.places = nn.Embedding(4, 12)
        self.norms = nn.ModuleList([nn.LayerNorm(12), nn.LayerNorm(12)])
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))

    def forward(self, x):
        tokens = self.patches(x).flatten(2).mT + self.places(torch.arange(4).expand(len(x), 4))
        query, key, value = self.qkv(self.norms[0](tokens)).chunk(3, dim=-1)
        tokens = tokens + self.out(nn.functional.scaled_dot_product_attention(query, key, value))
        return tokens + self.mlp(self.norms[1](tokens))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # an embedding's input asks for no gradient
@pytest.mark.parametrize(("kind", "shape"), [(Stack, (7, 5, 12)), (SmallViT, (7, 1, 8, 8))])
def test_gradients_equal_those_of_opacus(kind, shape):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(shape)
    parameters = dict(model.named_parameters())
    gradients = [patient_gradient(model(one[None]).square().mean(), parameters) for one in x]
    found = {name: torch.stack([gradient[name] for gradient in gradients]) for name in parameters}
    wrapped = GradSampleModule(model, loss_reduction="sum")
    wrapped(x.requires_grad_()).square().mean(dim=(1, 2)).sum().backward()
    for name, parameter in wrapped._module.named_parameters():
        assert_close(found[name], parameter.grad_sample, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backbone", ["dense", "dex"])
def test_a_patient_whose_gradient_is_not_finite_contributes_nothing(make_private, every_subset, fixed_masks, backbone):
    run = make_private("mae", backbone)
    trainer = Trainer(run)
    store = trainer.patch_features(every_subset(run))
    poisoned = int(store.rows["brain-mr"][2])
    without = clipped_sum(trainer, store, np.delete(np.arange(14), poisoned), 0)
    for value in (np.nan, np.inf, 1e38):
        store.images["brain-mr"][2] = value
        found = clipped_sum(trainer, store, np.arange(14), 0)
        for name, expected in without.items():
            assert_close(found[name], expected, atol=1e-6, rtol=0)


def test_the_clip_norm_is_joint_over_all_parameters():
    found = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(1, 1, dtype=torch.float64)}
    add_clipped(found, {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}, 1.0)
    add_clipped(found, {"a": torch.tensor([0.3, 0.0]), "b": torch.tensor([[0.4]])}, 1.0)
    assert_close(found["a"], torch.tensor([0.9, 0.0], dtype=torch.float64))
    assert_close(found["b"], torch.tensor([[1.2]], dtype=torch.float64))


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-23, 1.0, 1e23, 3e38])
@pytest.mark.parametrize("clip", [1e-30, 1e-3, 1.0, 1e30])
def test_no_gradient_is_too_small_or_too_large_to_be_clipped(size, clip):
    gradient = {"a": torch.full((1000,), size), "b": torch.full((10, 3), -size)}
    found = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in gradient.items()}
    add_clipped(found, gradient, clip)
    expected = min(1030**0.5 * gradient["a"][0].double().item(), clip)
    assert norm(found.values()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_and_an_empty_one_add_nothing(value):
    found = {"a": torch.ones(3, dtype=torch.float64), "b": torch.ones(1, dtype=torch.float64)}
    add_clipped(found, {"a": torch.tensor([1.0, value, 0.0]), "b": torch.ones(1)}, 1.0)
    add_clipped(found, {}, 1.0)
    assert all(torch.equal(each, torch.ones_like(each)) for each in found.values())


def test_a_stem_map_is_of_one_patient_to_the_bit(make_private, every_subset):
    run = make_private()
    store, trainer = every_subset(run, 4), Trainer(run)
    together = trainer.patch_features(store)
    for name, images in store.images.items():
        for row in (0, len(images) - 1):
            one = ImageStore(("s",), ("train",), {name: images[row : row + 1]}, {name: np.arange(1)})
            assert np.array_equal(trainer.patch_features(one).images[name][0], together.images[name][row])


def test_nobody_and_a_patient_without_streams_give_zero(make_private, every_subset):
    run = make_private()
    trainer = Trainer(run, ["heart-ct"])
    store = trainer.patch_features(every_subset(run))
    others = np.setdiff1d(np.arange(14), store.rows["heart-ct"])
    for sample in (np.arange(0), others):
        assert not any(value.any() for value in clipped_sum(trainer, store, sample, 0).values())
