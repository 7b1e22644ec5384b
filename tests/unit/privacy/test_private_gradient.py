"""Private rounds: paid for, noised as stated, and telling nothing but what the ledger lists."""

import numpy as np
import pytest
import torch

from panfm.data.store import ImageStore
from panfm.errors import LedgerError
from panfm.privacy import patient_sums
from panfm.privacy.ledger import Ledger, Limits
from panfm.privacy.patient_sums import noisy_profile, saliency_sum
from panfm.privacy.private_step import PrivateGradient, clipped_sum, gradient_parameters, train_privately
from panfm.privacy.randomness import with_noise
from panfm.training.trainer import Trainer


def permit(run, folder, round_number=1):
    limits = Limits(run.patient_dp.epsilon, run.patient_dp.delta)
    return Ledger(folder, "alpha").spend(run, "run-1", round_number, limits=limits, dataset="d")


def noisy_gradient(trainer, store, indices):
    """The gradient that a private step leaves, by name of parameter."""
    source = PrivateGradient(trainer, store, indices)
    for batch in source.draw():
        source.add(trainer.forward(batch, 0))
    assert source.finish()
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def guided(make_private, scope="site", backbone="dense", **more):
    run = make_private(backbone=backbone, **more)
    masking = run.masking.model_copy(update={"policy": "sgm", "saliency": "attention", "scope": scope})
    return run.model_copy(update={"masking": masking})


@pytest.mark.parametrize("backbone", ["dense", "dex"])
def test_a_round_moves_the_model_and_tells_public_numbers_only(make_private, make_store, tmp_path, backbone):
    run = make_private(backbone=backbone)
    trainer, store = Trainer(run), make_store(run)
    before = trainer.shared_state()
    result = train_privately(trainer, store, np.arange(12), permit=permit(run, tmp_path), first_step=0, num_steps=4)
    assert all(torch.isfinite(value).all() for value in trainer.shared_state().values())
    assert not torch.equal(before["backbone.norm.weight"], trainer.shared_state()["backbone.norm.weight"])
    assert np.isnan(result.loss)
    assert result.saliency == {}
    assert (result.num_skipped, result.subjects) == (0, 50)
    assert set(result.subjects_per_stream.values()) == {50}
    assert all(len(set(mass)) == 1 for mass in result.gate_mass.values())
    assert len(result.gate_mass) == (2 if backbone == "dex" else 0)


def test_directors_follow_all_experts_alike(make_private):
    """Who used which expert is a patient's secret."""
    trainer = Trainer(make_private(backbone="dex"))
    layers = trainer.model.director_experts().values()
    generator = torch.Generator().manual_seed(0)
    gradient = {
        name: torch.randn(value.shape, generator=generator)
        for name, value in trainer.model.named_parameters()
        if value.requires_grad
    }
    before = [layer.director[2].weight.clone() for layer in layers]
    trainer.set_gradient(gradient)
    trainer.update(0.5)
    for layer, start in zip(layers, before, strict=True):
        assert not torch.equal(layer.experts.weight_out[0], layer.experts.weight_out[1])
        expected = 0.9945 * start + 0.0055 * layer.experts.weight_out.mean(dim=0)
        torch.testing.assert_close(layer.director[2].weight, expected)
        assert not torch.equal(layer.director[2].weight, start)


def test_a_permit_is_used_once_and_for_its_own_round(make_private, make_store, tmp_path):
    run = make_private()
    trainer, store = Trainer(run), make_store(run)
    leave = permit(run, tmp_path)
    with pytest.raises(LedgerError, match="other mechanisms"):
        train_privately(trainer, store, np.arange(12), permit=leave, first_step=0, num_steps=5)
    train_privately(trainer, store, np.arange(2), permit=leave, first_step=0, num_steps=4)
    with pytest.raises(LedgerError, match="ran already"):
        train_privately(trainer, store, np.arange(2), permit=leave, first_step=4, num_steps=4)


def test_a_step_without_patients_is_noise_of_the_stated_size(make_private, make_store):
    run = make_private(clip=0.7)
    trainer, store = Trainer(run), make_store(run)
    torch.manual_seed(0)
    steps = [noisy_gradient(trainer, store, np.arange(0)) for _ in range(6)]
    torch.manual_seed(0)
    steps += [noisy_gradient(trainer, store, np.arange(0)) for _ in range(6)]
    values = [torch.cat([each.flatten() for each in step.values()]) for step in steps]
    assert not torch.equal(values[0], values[6])
    values = torch.cat(values).double()
    assert len(values) > 1_000_000
    stated = 1.0 * 0.7 / (0.25 * 50)
    assert values.std().item() == pytest.approx(stated, rel=0.005)
    assert values.std().item() != pytest.approx(1.02 * stated, rel=0.005)


@pytest.mark.slow
def test_a_step_is_a_poisson_sample_at_the_stated_rate_that_no_seed_decides(make_private, make_store, monkeypatch):
    """Each of 12 patients with chance 1/4, independently: a pass over shuffled patients would have 3 every time."""
    run = make_private()
    trainer, store, there = Trainer(run), make_store(run), []

    def patients(self, sample):
        there.append(np.isin(np.arange(12), sample))
        return iter(())

    monkeypatch.setattr(PrivateGradient, "patients", patients)
    for _ in range(5000):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        noisy_gradient(trainer, store, np.arange(12))
    assert np.mean(there) == pytest.approx(0.25, abs=0.011)  # six standard errors
    assert np.sum(there, axis=1).var() == pytest.approx(12 * 0.25 * 0.75, rel=0.12)
    assert np.abs(np.cov(np.array(there[1:]).T, np.array(there[:-1]).T) * (1 - np.eye(24))).max() < 0.02


def test_the_gradient_is_divided_by_a_public_number(make_private, make_store, fixed_masks):
    run = make_private()
    changes = {"noise_multiplier": 1e-12, "sample_rate": 1.0, "acknowledge_broken_guarantee": True}
    private = run.patient_dp.model_copy(update=changes)
    run = run.model_copy(update={"patient_dp": private})
    trainer, store = Trainer(run), make_store(run)
    store = trainer.patch_features(store)
    total = clipped_sum(trainer, store, np.arange(12), 0)
    for name, value in noisy_gradient(trainer, store, np.arange(12)).items():
        torch.testing.assert_close(value, (total[name] / 50).float(), atol=1e-8, rtol=1e-5)


PARTS = (
    'kind = "vectors"\n',
    'kind = "last-blocks"\nblocks = 1\n',
    'kind = "lora"\nrank = 2\nblocks = 1\nfrozen-a = true\n',
)


@pytest.mark.parametrize("parts", PARTS)
def test_what_is_not_trained_stays_to_the_bit(make_private, make_store, tmp_path, parts):
    run = make_private(extra=f"[train.parts]\n{parts}")
    trainer = Trainer(run)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    train_privately(trainer, make_store(run), np.arange(6), permit=permit(run, tmp_path), first_step=0, num_steps=4)
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trainer.model.trained == gradient_parameters(trainer.model).keys()


@pytest.mark.parametrize("scope", ["site", "subject", "federation"])
def test_masks_follow_the_noised_profile(make_private, make_store, tmp_path, scope):
    """With little noise: with more, all noised sums may be negative, which leaves the profile as it was."""
    run = guided(make_private, scope)
    run = run.model_copy(update={"patient_dp": run.patient_dp.model_copy(update={"statistics_noise": 1.0})})
    trainer, store = Trainer(run), make_store(run)
    leave = permit(run, tmp_path)
    assert [each.name for each in leave.mechanisms] == ["gradients", "saliency"][: 1 if scope == "subject" else 2]
    profile = {"brain-mr": 2.0, "heart-ct": 0.5}
    result = train_privately(trainer, store, np.arange(12), permit=leave, first_step=0, num_steps=4, profile=profile)
    assert result.saliency.keys() == (set() if scope == "subject" else set(run.streams))
    assert torch.equal(trainer.profile, torch.ones(3)) == (scope == "subject")


def test_saliency_moves_by_at_most_its_sensitivity(make_private, every_subset):
    run = guided(make_private)
    trainer = Trainer(run)
    store = trainer.patch_features(every_subset(run))
    everyone = np.arange(14)
    whole = saliency_sum(trainer, store, everyone)
    torch.testing.assert_close(whole.sum(dim=1), torch.full((2,), 14.0, dtype=torch.float64))
    changes = [(whole - saliency_sum(trainer, store, np.delete(everyone, each))).norm().item() for each in everyone]
    assert 1.0 < max(changes) <= 2**0.5 * (1 + 1e-6)


def test_the_profile_is_made_of_a_sum_with_noise_of_the_stated_size(make_private, make_store, monkeypatch):
    run = guided(make_private)
    trainer, store, noised = Trainer(run), make_store(run), []
    monkeypatch.setattr(patient_sums, "saliency_sum", lambda *_: torch.zeros(2, 500_000, dtype=torch.float64))
    monkeypatch.setattr(patient_sums, "with_noise", lambda *words: noised.append(with_noise(*words)) or noised[-1])
    found = noisy_profile(trainer, store, np.arange(12))
    stated = 20.0 * 2**0.5
    assert noised[0].std().item() == pytest.approx(stated, rel=0.005)
    assert noised[0].std().item() != pytest.approx(1.02 * stated, rel=0.005)
    shares, equal = noised[0].clamp_min(0.0) + stated
    assert torch.equal(found, (shares / equal).clamp_max(len(store.images)).float())


@pytest.mark.parametrize("scope", ["site", "federation"])
def test_masks_are_steered_by_what_was_noised(make_private, make_store, monkeypatch, scope):
    run = guided(make_private, scope)
    trainer, store, steered = Trainer(run), make_store(run), []
    trainer.profile = torch.tensor([0.5, 1.0, 1.5])
    mask = Trainer.mask
    monkeypatch.setattr(Trainer, "mask", lambda *words: steered.append(words[3]) or mask(*words))
    profile = {"brain-mr": 2.0, "heart-ct": 0.5, "eye-fundus": 1.0}
    clipped_sum(trainer, trainer.patch_features(store), np.arange(12), 0, profile)
    expected = trainer.profile if scope == "site" else torch.tensor(list(profile.values()))
    assert len(steered) > 1
    assert all(torch.equal(each, expected[None]) for each in steered)


def test_the_profile_tends_to_one_where_noise_rules_and_to_the_truth_where_not(make_private, every_subset):
    run = guided(make_private)
    trainer = Trainer(run)
    store = trainer.patch_features(every_subset(run))
    total = saliency_sum(trainer, store, np.arange(14))
    for noise, expected in ((1e-6, total[0] / total[1]), (1e5, None)):
        private = run.patient_dp.model_copy(update={"statistics_noise": noise})
        trainer.run = run.model_copy(update={"patient_dp": private})
        found = noisy_profile(trainer, store, np.arange(14))
        if expected is not None:
            torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)
        assert ((found > 0) & torch.isfinite(found)).all()


def test_a_patients_session_is_drawn_by_the_patients_own_generator(make_private):
    """Nobody else's sessions decide which one a patient shows."""
    images = np.random.default_rng(0).random((5, 3, 8, 8), dtype=np.float32)
    alone = ImageStore(("a",), ("train",), {"eye-fundus": images[:3]}, {"eye-fundus": np.array([0, 0, 0])})
    among = ImageStore(
        ("x", "a"), ("train",) * 2, {"eye-fundus": images[[3, 4, 0, 1, 2]]}, {"eye-fundus": np.array([0, 0, 1, 1, 1])}
    )
    cpu, shown = torch.device("cpu"), set()
    for seed in range(12):
        first, second = (
            patient_sums.one_patient(store, index, cpu, torch.Generator().manual_seed(seed)).images["eye-fundus"]
            for store, index in ((alone, 0), (among, 1))
        )
        assert torch.equal(first, second)
        shown |= {at for at in range(3) if np.array_equal(first[0], images[at])}
    assert shown == {0, 1, 2}
    assert np.array_equal(patient_sums.one_patient(alone, 0, cpu).images["eye-fundus"][0], images[0])
