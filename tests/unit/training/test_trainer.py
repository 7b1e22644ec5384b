"""The local loop: reproducible, resumable, skips what is not finite, learns something."""

import numpy as np
import pytest
import torch

from panfm.data.store import ImageStore
from panfm.seeds import derive_seed
from panfm.training.draw_order import batches
from panfm.training.gradient import BatchGradient
from panfm.training.policies import SaliencyPolicy
from panfm.training.trainer import Trainer

OBJECTIVES = ["latent", "dino", "mae"]


def train(trainer, store, *, first_step=0, num_steps=4, round_number=1, **more):
    everyone = np.arange(len(store.subjects))
    return trainer.train(
        store, everyone, first_step=first_step, num_steps=num_steps, site="a", round_number=round_number, **more
    )


def equal_states(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_same_round_gives_the_same_bits(make_run, make_store, objective):
    run = make_run(f'[objective]\nname = "{objective}"\n')
    store = make_store(run)
    trainers = [Trainer(run), Trainer(run)]
    results = [train(trainer, store) for trainer in trainers]
    assert results[0] == results[1]
    assert equal_states(trainers[0].shared_state(), trainers[1].shared_state())
    assert equal_states(trainers[0].private_state(), trainers[1].private_state())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_saved_round_goes_on_with_the_same_bits(make_run, make_store, objective):
    run = make_run(f'[objective]\nname = "{objective}"\n')
    store = make_store(run)
    whole = Trainer(run)
    train(whole, store)
    shared, private = whole.shared_state(), whole.private_state()
    train(whole, store, first_step=4, round_number=2)
    resumed = Trainer(run)
    resumed.load_shared(shared)
    resumed.load_private(private)
    train(resumed, store, first_step=4, round_number=2)
    assert equal_states(whole.shared_state(), resumed.shared_state())
    assert equal_states(whole.private_state(), resumed.private_state())


def test_the_round_and_the_site_decide_the_draws(make_run, make_store):
    run = make_run()
    store = make_store(run)
    first, second = Trainer(run), Trainer(run)
    train(first, store, round_number=1)
    train(second, store, round_number=2)
    assert not equal_states(first.shared_state(), second.shared_state())


def test_no_global_generator_is_touched(make_run, make_store):
    run = make_run()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    train(Trainer(run), make_store(run))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_step_that_is_not_finite_is_skipped_and_counted(make_run, make_store):
    run = make_run()
    trainer, store = Trainer(run), make_store(run, 6, complete=True)
    store.images["brain-mr"][2] = np.nan
    before = trainer.shared_state()
    result = train(trainer, store)
    assert result.num_skipped == result.num_steps == 4
    assert np.isnan(result.loss)
    assert equal_states(before, trainer.shared_state())


def test_training_lowers_the_loss(make_run, make_store):
    run = make_run('[objective]\nname = "mae"\n').model_copy(deep=True)
    run = run.model_copy(update={"train": run.train.model_copy(update={"rounds": 1, "local_steps": 60})})
    seen = []
    train(Trainer(run), make_store(run, 24), num_steps=60, on_step=lambda _, loss: seen.append(loss))
    assert np.mean(seen[-10:]) < 0.95 * np.mean(seen[:10])


def test_validation_changes_nothing_and_repeats(make_run, make_store):
    run = make_run()
    trainer, store = Trainer(run), make_store(run)
    train(trainer, store)
    before = trainer.private_state()
    first = trainer.validate(store, np.arange(5), site="a").loss
    assert first == trainer.validate(store, np.arange(5), site="a").loss
    assert equal_states(before, trainer.private_state())
    assert np.isnan(trainer.validate(store, np.arange(0), site="a").loss)


def test_saliency_is_reported_under_any_policy(make_run, make_store):
    run = make_run('[masking]\npolicy = "random"\n')
    store = make_store(run, complete=True)
    result = train(Trainer(run), store)
    assert sum(result.saliency.values()) == pytest.approx(3.0, abs=1e-4)
    assert result.subjects_per_stream == dict.fromkeys(run.streams, 12)


def test_the_federations_profile_steers_the_masks(make_run, make_store):
    run = make_run('[masking]\nscope = "federation"\nwarmup-steps = 1\n')
    store = make_store(run, complete=True)
    states = []
    for profile in ({"brain-mr": 3.0, "heart-ct": 0.1, "eye-fundus": 0.1}, {"brain-mr": 0.1, "heart-ct": 3.0}):
        trainer = Trainer(run)
        train(trainer, store, profile=profile)
        states.append(trainer.shared_state())
    assert not equal_states(*states)


@pytest.fixture
def leaning(monkeypatch):
    """A teacher whose CLS gives the first stream 8 of 10 parts; what guides the masks, and what gets hidden of each."""
    saliency, mask = Trainer.stream_saliency, Trainer.mask
    guides, hidden = [], []

    def lean(trainer, full):
        _, present = saliency(trainer, full)
        return present * torch.tensor([0.8, 0.1, 0.1]), present

    def note(trainer, features, full, relative, number, generator):
        guides.append(relative)
        drawn = mask(trainer, features, full, relative, number, generator)
        stream, count = trainer.model.stream_of_patch[drawn.hidden.patch_index], drawn.hidden.valid.sum()
        total = trainer.model.stream_of_patch[drawn.layout.patch_index]
        hidden.append([(stream == index).sum().item() / (total == index).sum().item() for index in range(3)])
        assert count == stream.numel()
        return drawn

    monkeypatch.setattr(Trainer, "stream_saliency", lean)
    monkeypatch.setattr(Trainer, "mask", note)
    return guides, hidden


@pytest.mark.parametrize("scope", ["subject", "site"])
@pytest.mark.parametrize(("policy", "sign"), [("sgm", 1), ("inverse", -1)])
def test_masks_follow_what_the_teacher_leans_on(make_run, make_store, leaning, policy, sign, scope):
    run = make_run(f'[masking]\npolicy = "{policy}"\nscope = "{scope}"\nwarmup-steps = 1\n')
    train(Trainer(run), make_store(run, complete=True), num_steps=8)
    _, hidden = leaning
    first, *others = np.mean(hidden[4:], axis=0)
    assert sign * (first - np.mean(others)) > 0.3


def test_a_policy_that_is_not_guided_sees_an_equal_split(make_run, make_store, leaning):
    run = make_run('[masking]\npolicy = "random"\n')
    train(Trainer(run), make_store(run, complete=True), num_steps=2)
    assert [guide.tolist() for guide in leaning[0]] == [[[1.0, 1.0, 1.0]]] * 2


def test_a_subjects_own_saliency_is_relative_to_an_equal_split(make_run, make_store, leaning):
    run = make_run('[masking]\nscope = "subject"\n')
    train(Trainer(run), make_store(run, complete=True), num_steps=1)
    assert leaning[0][0].tolist() == [pytest.approx([2.4, 0.3, 0.3])] * run.train.batch_size


def test_the_sites_profile_runs_behind_by_its_momentum(make_run, make_store, leaning):
    run = make_run()
    train(Trainer(run), make_store(run, complete=True), num_steps=2)
    once, twice = (guide[0].numpy() for guide in leaning[0])
    relative = np.array([2.4, 0.3, 0.3])
    np.testing.assert_allclose(once, 0.9 * 1 + 0.1 * relative, rtol=1e-5)
    np.testing.assert_allclose(twice, 0.9 * once + 0.1 * relative, rtol=1e-5)


def test_schedules_run_over_the_whole_run_and_not_over_the_round(make_run, make_store, monkeypatch):
    """Learning rate, teacher's momentum and guidance of every step, against the formulas written out."""
    run, rates, momenta, steps = make_run(), [], [], []
    scores = SaliencyPolicy.scores

    def note_step(policy, relative, num_subjects, step, generator):
        steps.append(step)
        return scores(policy, relative, num_subjects, step, generator)

    monkeypatch.setattr(SaliencyPolicy, "scores", note_step)
    trainer, store = Trainer(run), make_store(run)
    monkeypatch.setattr(trainer, "update_teacher", lambda momentum, _: momenta.append(momentum))
    for first in (0, 4):
        train(
            trainer,
            store,
            first_step=first,
            round_number=1 + first // 4,
            on_step=lambda *_: rates.append([group["lr"] for group in trainer.optimiser.param_groups]),
        )
    assert steps == list(range(8))
    for step in range(8):
        position = (step + 0.5) / 8
        rate = position / 0.1 if position < 0.1 else 0.5 * (1 + np.cos(np.pi * (position - 0.1) / 0.9))
        assert rates[step] == pytest.approx([run.train.learning_rate * rate] * 2)
        assert momenta[step] == pytest.approx(0.999 + (0.99 - 0.999) * 0.5 * (1 + np.cos(np.pi * position)))


def test_the_teacher_is_an_average_of_the_students(make_run, make_store):
    run = make_run("teacher-momentum = [0.9, 0.9]\n")
    trainer, store = Trainer(run), make_store(run)
    start = trainer.shared_state()
    train(trainer, store, num_steps=1)
    for name, student in trainer.shared_state().items():
        kept = trainer.private_state()[f"teacher.{name}"]
        torch.testing.assert_close(kept, 0.9 * start[name] + 0.1 * student)


def test_the_teacher_encodes_and_the_student_never_sees_everything(make_run, make_store, monkeypatch):
    run = make_run()
    trainer = Trainer(run)
    monkeypatch.setattr(trainer.model, "encode", None)
    train(trainer, make_store(run), num_steps=1)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_skipped_step_leaves_everything_as_it_was(make_run, make_store, objective):
    run = make_run(f'[objective]\nname = "{objective}"\n')
    trainer, store = Trainer(run), make_store(run, 6, complete=True)
    train(trainer, store)
    broken = make_store(run, 6, complete=True)
    broken.images["brain-mr"][2] = np.nan
    before = trainer.private_state() | trainer.shared_state()
    assert train(trainer, broken, first_step=4, round_number=2).num_skipped == 4
    assert equal_states(before, trainer.private_state() | trainer.shared_state())


def test_gradients_are_clipped_to_their_norm(make_run, make_store, monkeypatch):
    run = make_run("clip-norm = 0.001\n")
    trainer, norms = Trainer(run), []

    def note_norm():
        gradients = [parameter.grad.flatten() for parameter in trainer.parameters if parameter.grad is not None]
        norms.append(torch.cat(gradients).norm().item())

    monkeypatch.setattr(trainer.optimiser, "step", note_norm)
    train(trainer, make_store(run), num_steps=2)
    assert norms == pytest.approx([0.001, 0.001], rel=1e-3)


def test_only_matrices_decay(make_run):
    trainer = Trainer(make_run())
    matrices, vectors = trainer.optimiser.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.05, 0.0)
    assert {parameter.dim() for parameter in matrices["params"]} == {2}
    assert {parameter.dim() for parameter in vectors["params"]} == {1}


def test_validation_masks_without_guidance(make_run, make_store, leaning):
    run = make_run()
    trainer, store = Trainer(run), make_store(run, complete=True)
    train(trainer, store)
    leaning[0].clear()
    trainer.validate(store, np.arange(5), site="a")
    assert [guide.tolist() for guide in leaning[0]] == [[[1.0, 1.0, 1.0]]]


def test_every_pass_has_an_order_of_its_own():
    stream = batches(np.arange(10), 5, np.random.default_rng(0))
    passes = [np.concatenate([next(stream), next(stream)]).tolist() for _ in range(2)]
    assert passes[0] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(10)) != passes[0]


@pytest.mark.parametrize(("num", "size", "expected"), [(10, 4, [4, 4, 4, 4]), (3, 4, [3, 3, 3]), (4, 4, [4, 4])])
def test_batches_pass_over_everyone(num, size, expected):
    stream = batches(np.arange(num), size, np.random.default_rng(0))
    drawn = [next(stream) for _ in expected]
    assert [len(batch) for batch in drawn] == expected
    per_pass = max(num // size, 1)
    assert len(set(np.concatenate(drawn[:per_pass]).tolist())) == sum(expected[:per_pass])


@pytest.mark.parametrize("saliency", ["attention", "value"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bf16_autocast_trains_too(make_run, make_store, monkeypatch, objective, saliency):
    """What CUDA does, on CPU: mixed dtypes must meet without error, and land near the float32 loss."""
    run = make_run(f'[objective]\nname = "{objective}"\n[masking]\nsaliency = "{saliency}"\nwarmup-steps = 1\n')
    store = make_store(run)
    exact = train(Trainer(run), store, num_steps=2)
    monkeypatch.setattr("panfm.training.trainer._autocast", lambda _: torch.autocast("cpu", dtype=torch.bfloat16))
    mixed = train(Trainer(run), store, num_steps=2)
    assert mixed.num_skipped == 0
    assert mixed.loss == pytest.approx(exact.loss, rel=0.05)
    assert mixed.loss != exact.loss


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_recovers_after_a_step_that_was_skipped(make_run, make_store, objective):
    run = make_run(f'[objective]\nname = "{objective}"\n')
    trainer, store = Trainer(run), make_store(run, 18, complete=True)
    store.images["brain-mr"][2] = np.nan
    result = train(trainer, store, num_steps=6)
    assert result.num_skipped == 2
    assert np.isfinite(result.loss)
    assert all(torch.isfinite(value).all() for value in trainer.private_state().values())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_subject_with_one_token_has_nothing_hidden(make_run, make_store, objective):
    run = make_run(f'[objective]\nname = "{objective}"\n')
    whole = {name: stream.model_copy(update={"patch": stream.shape}) for name, stream in run.streams.items()}
    run = run.model_copy(update={"streams": whole})
    trainer = Trainer(run, ["heart-ct"])
    result = train(trainer, make_store(run, 8, complete=True), num_steps=2)
    assert result.num_skipped == (2 if objective == "mae" else 0)


def test_validation_leaves_out_who_holds_no_trained_stream(make_run, make_store):
    run = make_run()
    store = make_store(run, 9)
    trainer = Trainer(run, ["heart-ct"])
    holders = store.rows["heart-ct"]
    assert 0 < len(holders) < 9
    everyone = trainer.validate(store, np.arange(9), site="a").loss
    assert everyone == trainer.validate(store, holders, site="a").loss
    others = np.setdiff1d(np.arange(9), holders)
    assert np.isnan(trainer.validate(store, others, site="a").loss)


def test_a_run_of_one_step_moves_the_model(make_run, make_store):
    run = make_run()
    run = run.model_copy(update={"train": run.train.model_copy(update={"rounds": 1, "local_steps": 1})})
    trainer = Trainer(run)
    before = trainer.shared_state()
    train(trainer, make_store(run), num_steps=1)
    assert not equal_states(before, trainer.shared_state())


def test_a_step_draws_one_session_of_each_patient_by_seed_site_and_round(make_run):
    """The drawn sessions by hand from the seeds; another round draws others."""
    run = make_run()
    rows = np.repeat(np.arange(6), 3)
    images = np.random.default_rng(0).random((18, 3, 8, 8), dtype=np.float32)
    store = ImageStore(tuple("abcdef"), ("train",) * 6, {"eye-fundus": images}, {"eye-fundus": rows})
    drawn = {number: drawn_images(run, store, number) for number in (1, 2)}
    for number, (subjects, batch) in drawn.items():
        picks = [derive_seed(7, "a", number, "sessions", 0, int(subject)) % 3 for subject in subjects]
        np.testing.assert_array_equal(batch, images[3 * subjects + np.array(picks)])
    assert not np.array_equal(drawn[1][1], drawn[2][1])


def drawn_images(run, store, round_number):
    trainer = Trainer(run, ["eye-fundus"])
    everyone = np.arange(6)
    source = BatchGradient(trainer, trainer.experts, store, everyone, site="a", round_number=round_number)
    (batch,) = source.draw()
    return batch.subjects, batch.inputs.images["eye-fundus"].numpy()


def test_sessions_count_as_one_patient_in_a_rounds_result(make_run, make_store):
    run = make_run()
    single = make_store(run, complete=True)
    images = {name: np.repeat(image, 2, axis=0) for name, image in single.images.items()}
    rows = {name: np.repeat(row, 2) for name, row in single.rows.items()}
    store = ImageStore(single.subjects, single.splits, images, rows)
    once, twice = (train(Trainer(run), one) for one in (single, store))
    assert twice == once  # the two sessions are alike
    assert twice.subjects_per_stream == dict.fromkeys(run.streams, 12)
