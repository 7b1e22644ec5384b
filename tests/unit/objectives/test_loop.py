"""The local loop: reproducible, resumable, skips what is not finite, learns something."""

import numpy as np
import pytest
import torch

from panfm.objectives import Learner, loop
from panfm.objectives.loop import batches

OBJECTIVES = ["latent", "dino", "mae"]


def train(learner, store, *, first_step=0, num_steps=4, round_number=1, **more):
    everyone = np.arange(len(store.subjects))
    return learner.train(
        store, everyone, first_step=first_step, num_steps=num_steps, site="a", round_number=round_number, **more
    )


def equal_states(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_same_round_gives_the_same_bits(make_run, make_store, objective):
    run = make_run(f'[objective]\nname = "{objective}"\n')
    store = make_store(run)
    learners = [Learner(run), Learner(run)]
    results = [train(learner, store) for learner in learners]
    assert results[0] == results[1]
    assert equal_states(learners[0].shared_state(), learners[1].shared_state())
    assert equal_states(learners[0].private_state(), learners[1].private_state())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_saved_round_goes_on_with_the_same_bits(make_run, make_store, objective):
    run = make_run(f'[objective]\nname = "{objective}"\n')
    store = make_store(run)
    whole = Learner(run)
    train(whole, store)
    shared, private = whole.shared_state(), whole.private_state()
    train(whole, store, first_step=4, round_number=2)
    resumed = Learner(run)
    resumed.load_shared(shared)
    resumed.load_private(private)
    train(resumed, store, first_step=4, round_number=2)
    assert equal_states(whole.shared_state(), resumed.shared_state())
    assert equal_states(whole.private_state(), resumed.private_state())


def test_the_round_and_the_site_decide_the_draws(make_run, make_store):
    run = make_run()
    store = make_store(run)
    first, second = Learner(run), Learner(run)
    train(first, store, round_number=1)
    train(second, store, round_number=2)
    assert not equal_states(first.shared_state(), second.shared_state())


def test_no_global_generator_is_touched(make_run, make_store):
    run = make_run()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    train(Learner(run), make_store(run))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_step_that_is_not_finite_is_skipped_and_counted(make_run, make_store):
    run = make_run()
    learner, store = Learner(run), make_store(run, 6, complete=True)
    store.images["brain-mr"][2] = np.nan
    before = learner.shared_state()
    result = train(learner, store)
    assert result.num_skipped == result.num_steps == 4
    assert np.isnan(result.loss)
    assert equal_states(before, learner.shared_state())


def test_training_lowers_the_loss(make_run, make_store):
    run = make_run('[objective]\nname = "mae"\n').model_copy(deep=True)
    run = run.model_copy(update={"train": run.train.model_copy(update={"rounds": 1, "local_steps": 60})})
    seen = []
    train(Learner(run), make_store(run, 24), num_steps=60, on_step=lambda _, loss: seen.append(loss))
    assert np.mean(seen[-10:]) < 0.95 * np.mean(seen[:10])


def test_validation_changes_nothing_and_repeats(make_run, make_store):
    run = make_run()
    learner, store = Learner(run), make_store(run)
    train(learner, store)
    before = learner.private_state()
    first = learner.validation_loss(store, np.arange(5), site="a")
    assert first == learner.validation_loss(store, np.arange(5), site="a")
    assert equal_states(before, learner.private_state())
    assert np.isnan(learner.validation_loss(store, np.arange(0), site="a"))


def test_saliency_is_reported_under_any_policy(make_run, make_store):
    run = make_run('[masking]\npolicy = "random"\n')
    store = make_store(run, complete=True)
    result = train(Learner(run), store)
    assert sum(result.saliency.values()) == pytest.approx(3.0, abs=1e-4)
    assert result.subjects_per_stream == dict.fromkeys(run.streams, 12)


def test_the_federations_profile_steers_the_masks(make_run, make_store):
    run = make_run('[masking]\nscope = "federation"\nwarmup-steps = 1\n')
    store = make_store(run, complete=True)
    states = []
    for profile in ({"brain-mr": 3.0, "heart-ct": 0.1, "eye-fundus": 0.1}, {"brain-mr": 0.1, "heart-ct": 3.0}):
        learner = Learner(run)
        train(learner, store, profile=profile)
        states.append(learner.shared_state())
    assert not equal_states(*states)


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
    exact = train(Learner(run), store, num_steps=2)
    monkeypatch.setattr(loop, "_autocast", lambda _: torch.autocast("cpu", dtype=torch.bfloat16))
    mixed = train(Learner(run), store, num_steps=2)
    assert mixed.num_skipped == 0
    assert mixed.loss == pytest.approx(exact.loss, rel=0.05)
    assert mixed.loss != exact.loss


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_recovers_after_a_step_that_was_skipped(make_run, make_store, objective):
    run = make_run(f'[objective]\nname = "{objective}"\n')
    learner, store = Learner(run), make_store(run, 18, complete=True)
    store.images["brain-mr"][2] = np.nan
    result = train(learner, store, num_steps=6)
    assert result.num_skipped == 2
    assert np.isfinite(result.loss)
    assert all(torch.isfinite(value).all() for value in learner.private_state().values())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_subject_with_one_token_has_nothing_hidden(make_run, make_store, objective):
    run = make_run(f'[objective]\nname = "{objective}"\n')
    whole = {name: stream.model_copy(update={"patch": stream.shape}) for name, stream in run.streams.items()}
    run = run.model_copy(update={"streams": whole})
    learner = Learner(run, ["heart-ct"])
    result = train(learner, make_store(run, 8, complete=True), num_steps=2)
    assert result.num_skipped == (2 if objective == "mae" else 0)


def test_validation_leaves_out_who_holds_no_trained_stream(make_run, make_store):
    run = make_run()
    store = make_store(run, 9)
    learner = Learner(run, ["heart-ct"])
    holders = store.rows["heart-ct"]
    assert 0 < len(holders) < 9
    everyone = learner.validation_loss(store, np.arange(9), site="a")
    assert everyone == learner.validation_loss(store, holders, site="a")
    others = np.setdiff1d(np.arange(9), holders)
    assert np.isnan(learner.validation_loss(store, others, site="a"))


def test_a_run_of_one_step_moves_the_model(make_run, make_store):
    run = make_run()
    run = run.model_copy(update={"train": run.train.model_copy(update={"rounds": 1, "local_steps": 1})})
    learner = Learner(run)
    before = learner.shared_state()
    train(learner, make_store(run), num_steps=1)
    assert not equal_states(before, learner.shared_state())
