"""Shared and private state of a trainer, and that the two together are the whole state."""

import numpy as np
import pytest
import torch

from panfm.models import build_model
from panfm.training.trainer import Trainer

PRIVATE_HEAD = '[sharing]\nhead = "private"\n'


def train(trainer, store, round_number=1):
    everyone = np.arange(len(store.subjects))
    trainer.train(
        store, everyone, first_step=4 * (round_number - 1), num_steps=4, site="a", round_number=round_number
    )  # fmt: skip


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_two_states_hold_every_parameter_once(make_run):
    for extra in ("", PRIVATE_HEAD):
        trainer = Trainer(make_run(extra))
        private = {name for name in trainer.private_state() if name.startswith("student.")}
        shared = {f"student.{name}" for name in trainer.shared_state()}
        assert shared | private == {f"student.{name}" for name in trainer.model.state_dict()}
        assert not shared & private
        assert {name.split(".")[1] for name in private} == ({"heads"} if extra else set())


def test_private_heads_go_on_with_the_same_bits(make_run, make_store):
    run = make_run(PRIVATE_HEAD)
    store, whole = make_store(run), Trainer(run)
    train(whole, store)
    shared, private = whole.shared_state(), whole.private_state()
    train(whole, store, 2)
    resumed = Trainer(run)
    train(resumed, make_store(run, seed=5))
    resumed.load_shared(shared)
    resumed.load_private(private)
    train(resumed, store, 2)
    assert same(whole.shared_state(), resumed.shared_state())
    assert same(whole.private_state(), resumed.private_state())


def test_a_fresh_private_part_is_seeded_and_leaves_the_shared_one(make_run, make_store):
    run = make_run(PRIVATE_HEAD)
    trainer = Trainer(run)
    train(trainer, make_store(run))
    shared = trainer.shared_state()
    trainer.reset_private()
    seeded = build_model(run).state_dict()
    fresh = trainer.private_state()
    assert torch.equal(fresh["student.heads.project.1.weight"], seeded["heads.project.1.weight"])
    assert same(shared, trainer.shared_state())
    assert all(torch.equal(fresh[f"teacher.{name}"], value) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("extra", ["", PRIVATE_HEAD])
def test_names_must_match_exactly(make_run, extra):
    trainer = Trainer(make_run(extra))
    state = trainer.shared_state()
    with pytest.raises(RuntimeError, match=r"backbone\.cls"):
        trainer.load_shared({name: value for name, value in state.items() if name != "backbone.cls"})
    with pytest.raises(RuntimeError, match="extra"):
        trainer.load_shared(state | {"extra": state["backbone.cls"]})


FRESH = 'optimiser-state = "fresh"\n'
MAE = '[objective]\nname = "mae"\n[masking]\npolicy = "random"\n'


def test_a_fresh_optimiser_forgets_and_is_not_kept(make_run, make_store):
    run = make_run(FRESH)
    store, trainer = make_store(run), Trainer(run)
    train(trainer, store)
    shared, private = trainer.shared_state(), trainer.private_state()
    assert not any(name.startswith("optimiser.") for name in private)
    trainer.load_shared(shared)
    train(trainer, store, 2)
    other = Trainer(run)
    other.load_shared(shared)
    other.load_private(private)
    train(other, store, 2)
    assert same(trainer.shared_state(), other.shared_state())


def test_a_kept_optimiser_goes_on(make_run, make_store):
    run = make_run()
    trainer = Trainer(run)
    train(trainer, make_store(run))
    before = trainer.private_state()["optimiser.exp_avg"]
    trainer.load_shared(trainer.shared_state())
    assert before.any()
    assert torch.equal(trainer.private_state()["optimiser.exp_avg"], before)


@pytest.mark.parametrize("policy", ["random", "sgm"])
def test_a_teacher_is_kept_only_where_something_uses_it(make_run, make_store, policy):
    run = make_run(MAE.replace("random", policy))
    trainer = Trainer(run)
    train(trainer, make_store(run))
    kept = any(name.startswith("teacher.") for name in trainer.private_state())
    assert kept == (trainer.teacher is not trainer.model) == (policy == "sgm")


def test_without_a_teacher_a_private_head_goes_on_with_the_same_bits(make_run, make_store):
    run = make_run(FRESH + MAE + PRIVATE_HEAD)
    store, whole = make_store(run), Trainer(run)
    train(whole, store)
    shared, private = whole.shared_state(), whole.private_state()
    assert {name.split(".")[0] for name in private} == {"student", "saliency"}
    whole.load_teacher(shared)
    whole.load_shared(shared)
    train(whole, store, 2)
    resumed = Trainer(run)
    resumed.load_shared(shared)
    resumed.load_private(private)
    train(resumed, store, 2)
    assert same(whole.shared_state(), resumed.shared_state())
    assert same(whole.private_state(), resumed.private_state())
