"""A trainer that trains a part: nothing else moves, is kept twice, or has moments; it resumes with the same bits."""

import numpy as np
import pytest
import torch

from panfm.training.trainer import Trainer
from tests.cases import quick
from tests.unit.models.test_trained_parts import DEX, run_of

CASES = [("attention-projections", ""), ("lora", ""), ("last-blocks", DEX), ("norms", DEX)]


def train(trainer, store, round_number=1):
    everyone = np.arange(len(store.subjects))
    trainer.train(
        store, everyone, first_step=4 * (round_number - 1), num_steps=4, site="a", round_number=round_number
    )  # fmt: skip


def whole(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize(("part", "extra"), quick(CASES, [("lora", ""), ("norms", DEX)]))
def test_only_the_part_moves_and_it_goes_on_with_the_same_bits(part, extra, make_store):
    run = run_of(part, extra)
    store, trainer = make_store(run), Trainer(run)
    before = whole(trainer)
    train(trainer, store)
    moved = {name for name, value in whole(trainer).items() if not torch.equal(value, before[name])}
    assert moved <= trainer.model.trained
    assert len(moved) > 0.5 * len(trainer.model.trained)
    frozen, shared, private = trainer.frozen_state(), trainer.shared_state(), trainer.private_state()
    train(trainer, store, 2)
    resumed = Trainer(run)
    train(resumed, make_store(run, seed=5))
    resumed.load_frozen(frozen)
    resumed.load_shared(shared)
    resumed.load_private(private)
    train(resumed, store, 2)
    for name, value in whole(trainer).items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    again, wanted = resumed.private_state(), trainer.private_state()
    assert again.keys() == wanted.keys()
    assert all(torch.equal(value, again[name]) for name, value in wanted.items())


def test_what_is_not_trained_has_no_moments_and_one_copy_in_memory():
    trainer = Trainer(run_of("norms"))
    sizes = {name: value.numel() for name, value in trainer.model.named_parameters()}
    private = trainer.private_state()
    trained = sum(sizes[name] for name in trainer.model.trained)
    assert private["optimiser.exp_avg"].numel() == trained < sum(sizes.values())
    assert {name for name in private if name.startswith("teacher.")} == {f"teacher.{n}" for n in trainer.model.trained}
    own, teacher = (dict(model.named_parameters()) for model in (trainer.model, trainer.teacher))
    shared = {name for name in own if own[name].data_ptr() == teacher[name].data_ptr()}
    assert shared == sizes.keys() - trainer.model.trained


def test_names_of_another_part_are_refused():
    trainer, other = Trainer(run_of("norms")), Trainer(run_of("last-blocks"))
    with pytest.raises(RuntimeError, match="backbone"):
        trainer.load_shared({**other.shared_state(), "backbone.more": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Missing key"):
        trainer.load_private(other.private_state())


def test_layer_decay_scales_the_first_step_by_layer(make_run, make_store):
    """AdamW's first step is about the learning rate, whatever the gradient."""
    moved = {}
    for decay in (1.0, 0.5):
        run = make_run(f"layer-decay = {decay}\nweight-decay = 0.0\nwarmup = 0.0\n")
        trainer = Trainer(run)
        before = whole(trainer)
        trainer.train(make_store(run), np.arange(12), first_step=0, num_steps=1, site="a", round_number=1)
        moved[decay] = {name: (value - before[name]).norm() for name, value in whole(trainer).items()}
    ratios = {name: float(moved[0.5][name] / moved[1.0][name]) for name in moved[1.0] if moved[1.0][name] > 0}
    assert ratios["backbone.norm.weight"] == pytest.approx(1.0, rel=1e-3)
    assert ratios["backbone.blocks.1.mlp.2.weight"] == pytest.approx(0.5, rel=1e-3)
    assert ratios["backbone.blocks.0.mlp.2.weight"] == pytest.approx(0.25, rel=1e-3)
    assert ratios["streams.brain-mr.project.weight"] == pytest.approx(0.125, rel=1e-3)
