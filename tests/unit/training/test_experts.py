"""Local training on a Director-Experts backbone: any objective, any masking; what moves, and when."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from panfm.config.model import ExpertsConfig
from panfm.models.director_experts import balance_loss, layer_weight
from panfm.training import gradient
from panfm.training.objectives.interface import student_output
from panfm.training.token_mask import TokenMask
from panfm.training.trainer import Trainer

OBJECTIVES = ["latent", "dino", "mae"]
POLICIES = ["random", "organ", "sgm", "inverse", "static"]
FIRST = "backbone.blocks.0.mlp"


@pytest.fixture
def make_dex(make_run):
    def make(objective="mae", extra="", experts="count = 4"):
        return make_run(
            f'[model]\nbackbone = "director-experts"\n[model.experts]\n{experts}\n'
            f'[objective]\nname = "{objective}"\n{extra}'
        )

    return make


def train(trainer, store, *, first_step=0, num_steps=4, round_number=1, **more):
    everyone = np.arange(len(store.subjects))
    return trainer.train(
        store, everyone, first_step=first_step, num_steps=num_steps, site="a", round_number=round_number, **more
    )


def equal_states(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def directors(trainer):
    return {name: value for name, value in trainer.shared_state().items() if ".director." in name}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_objective_and_any_masking_trains(make_dex, make_store, objective, policy):
    run = make_dex(objective, f'[masking]\npolicy = "{policy}"\nstatic-organs = ["heart"]\nwarmup-steps = 1\n')
    trainer, store = Trainer(run), make_store(run)
    before, teacher = deepcopy(trainer.model.state_dict()), trainer.private_state()
    result = train(trainer, store, num_steps=2)
    assert result.num_skipped == 0
    assert np.isfinite(result.loss)
    assert list(result.gate_mass) == [FIRST, "backbone.blocks.1.mlp"]
    assert [sum(mass) for mass in result.gate_mass.values()] == pytest.approx([12.0, 12.0], rel=1e-5)
    after = trainer.model.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {name for name in before if name.startswith(f"{FIRST}.")} <= moved
    routers = [name for name in teacher if name.startswith("teacher.") and "router" in name]
    assert not any(torch.equal(teacher[name], trainer.private_state()[name]) for name in routers)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_saved_round_goes_on_with_the_same_bits(make_dex, make_store, objective):
    run = make_dex(objective)
    store = make_store(run)
    whole = Trainer(run)
    train(whole, store)
    shared, private = whole.shared_state(), whole.private_state()
    expected = train(whole, store, first_step=4, round_number=2)
    resumed = Trainer(run)
    resumed.load_shared(shared)
    resumed.load_private(private)
    assert train(resumed, store, first_step=4, round_number=2) == expected
    assert equal_states(whole.shared_state(), resumed.shared_state())
    assert equal_states(whole.private_state(), resumed.private_state())


def test_the_activation_is_private_and_starts_even(make_dex, make_store):
    run = make_dex()
    trainer = Trainer(run)
    train(trainer, make_store(run))
    assert not any("activation" in name for name in trainer.shared_state())
    activation = trainer.private_state()[f"activation.{FIRST}"]
    assert activation.sum().item() == pytest.approx(1.0)
    assert not torch.equal(activation, torch.full((4,), 0.25))
    trainer.reset_private()
    assert torch.equal(trainer.private_state()[f"activation.{FIRST}"], torch.full((4,), 0.25))


def test_one_step_moves_director_and_activation_by_the_gate_mass(make_dex, make_store):
    run = make_dex(experts="count = [4, 3]\ndirector-momentum = [0.6, 0.9]")
    trainer = Trainer(run)
    before = directors(trainer)
    result = train(trainer, make_store(run), first_step=3, num_steps=1)
    momentum = 0.9 - 0.3 * 0.5 * (1.0 + math.cos(math.pi * 3.5 / 8))
    after = trainer.model.state_dict()
    names = {"0.weight": "weight_in", "0.bias": "bias_in", "2.weight": "weight_out", "2.bias": "bias_out"}
    for layer, mass in result.gate_mass.items():
        share = torch.tensor(mass) / sum(mass)
        assert_close(trainer.private_state()[f"activation.{layer}"], 0.99 / len(mass) + 0.01 * share)
        for director, stacked in names.items():
            experts = after[f"{layer}.experts.{stacked}"]
            group = sum(share[r] * experts[r] for r in range(len(mass)))
            expected = momentum * before[f"{layer}.director.{director}"] + (1.0 - momentum) * group
            assert_close(after[f"{layer}.director.{director}"], expected, atol=1e-6, rtol=1e-5)


def test_the_director_moves_after_the_optimiser_by_the_updated_experts(make_dex, make_store, monkeypatch):
    """Experts at 2 before the step and 1 after it, director at 0, momentum .6: .4 x 1, not .4 x 2."""
    trainer = Trainer(make_dex(experts="count = 4\ndirector-momentum = [0.6, 0.6]"))
    layers = trainer.model.director_experts().values()

    def set_numbers(experts, director):
        for layer in layers:
            for stacked, its in layer._expert_and_director():
                stacked.detach().fill_(experts)
                its.fill_(director)

    def to_one():
        set_numbers(1.0, 0.0)

    set_numbers(2.0, 0.0)
    monkeypatch.setattr(trainer.optimiser, "step", to_one)
    train(trainer, make_store(trainer.run), num_steps=1)
    for layer in layers:
        for parameter in layer.director.parameters():
            assert_close(parameter, torch.full_like(parameter, 0.4))


def test_a_step_that_is_not_finite_leaves_no_trace(make_dex, make_store):
    run = make_dex()
    trainer, store = Trainer(run), make_store(run, 6, complete=True)
    store.images["brain-mr"][2] = np.nan
    shared, private = trainer.shared_state(), trainer.private_state()
    result = train(trainer, store)
    assert result.num_skipped == 4
    assert result.gate_mass == {FIRST: [0.0] * 4, "backbone.blocks.1.mlp": [0.0] * 4}
    assert equal_states(shared, trainer.shared_state())
    assert equal_states(private, trainer.private_state())


def test_a_step_that_asks_for_nothing_is_skipped_whatever_the_experts_would_add(make_dex, make_store):
    run = make_dex("mae")
    whole = {name: stream.model_copy(update={"patch": stream.shape}) for name, stream in run.streams.items()}
    run = run.model_copy(update={"streams": whole})
    trainer = Trainer(run, ["heart-ct"])
    assert train(trainer, make_store(run, 8, complete=True), num_steps=2).num_skipped == 2


def output_of(trainer, store, exploration):
    features = trainer.model.patch_features(store.batch(np.arange(6)))
    layout = trainer.model.layout(features)
    hidden = (layout.patch_index % 2 == 0) & layout.valid
    return student_output(trainer.model, features, TokenMask.of(layout, hidden), exploration)


def draws():
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("kind", ["cosine", "softmax"])
def test_the_added_losses_are_weighted_by_layer_and_schedule(make_dex, make_store, kind):
    run = make_dex(
        experts=f'count = 4\nalignment = "{kind}"\nalignment-weight = 0.3\nbalance-weight = [0.2, 0.1]',
    )
    trainer = Trainer(run)
    encoded = output_of(trainer, make_store(run), trainer.experts.exploration(0.25, draws())).encoded
    valid = torch.nn.functional.pad(encoded.layout.valid, (1, 0), value=True)
    layers = list(trainer.model.director_experts().values())
    aligned = [layer.alignment_loss(routed, valid, kind) for layer, routed in zip(layers, encoded.routed, strict=True)]
    expected = 0.3 / 2 * (layer_weight(1, 2) * aligned[0] + layer_weight(2, 2) * aligned[1]).mean()
    rate = 0.1 + 0.1 * 0.5 * (1.0 + math.cos(math.pi * 0.25))
    expected = expected + rate * sum(balance_loss(routed.probs) for routed in encoded.routed) / 2
    loss = torch.zeros((), requires_grad=True)
    assert_close(trainer.experts.regularise(loss, encoded, 0.25), expected)


def test_noise_fades_over_the_run_and_is_for_training_only(make_dex, make_store):
    run = make_dex(experts="count = 4\nnoise = [1.0, 0.0]")
    trainer, store = Trainer(run), make_store(run)
    scales = [trainer.experts.exploration(progress, draws()).scale for progress in (0.0, 0.5, 1.0)]
    assert scales == pytest.approx([1.0, 0.5, 0.0])
    kinds = (trainer.experts.exploration(0.0, draws()), None)
    noisy, quiet = (output_of(trainer, store, kind).encoded.routed[0].probs for kind in kinds)
    assert not torch.allclose(noisy, quiet)
    teacher = [
        trainer.teacher.encode(trainer.model.patch_features(store.batch([0, 1]))).routed[0].probs for _ in range(2)
    ]
    assert torch.equal(*teacher)
    losses = [trainer.validate(store, np.arange(5), site="a").loss for _ in range(2)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("without", "with_it"),
    [
        ("noise = [0.0, 0.0]", "noise = [1.0, 1.0]"),
        ("alignment-weight = 0.0", "alignment-weight = 1.0"),
        ("balance-weight = [0.0, 0.0]", "balance-weight = [1.0, 1.0]"),
    ],
)
def test_noise_alignment_and_balance_each_change_what_a_round_ends_with(make_dex, make_store, without, with_it):
    trainers = [Trainer(make_dex(experts=f"count = 4\n{each}")) for each in (without, with_it, with_it)]
    for trainer in trainers:
        train(trainer, make_store(trainer.run), num_steps=2)
    ends = [trainer.model.state_dict() for trainer in trainers]
    assert not equal_states(ends[0], ends[1])
    assert equal_states(ends[1], ends[2])


def test_numbers_that_are_not_given_are_the_papers():
    assert ExpertsConfig() == ExpertsConfig(
        count=(8,),
        active=(2,),
        temperature=0.5,
        noise=(1.0, 0.0),
        director_momentum=(0.99, 0.999),
        alignment="cosine",
        alignment_weight=0.01,
        balance_weight=(0.001, 0.0),
    )


def test_rounds_and_sites_draw_their_own_noise(make_dex, make_store, monkeypatch):
    run = make_dex()
    store, purposes = make_store(run), []
    real = gradient.torch_generator
    monkeypatch.setattr(gradient, "torch_generator", lambda *parts: purposes.append(parts) or real(*parts))
    train(Trainer(run), store, num_steps=1, round_number=2)
    assert (7, "a", 2, "routing") in purposes


def test_a_dense_backbone_adds_nothing(make_run, make_store):
    run = make_run()
    trainer = Trainer(run)
    assert trainer.experts.exploration(0.0, draws()) is None
    loss = torch.ones((), requires_grad=True)
    assert trainer.experts.regularise(loss, output_of(trainer, make_store(run), None).encoded, 0.0) is loss
    assert train(trainer, make_store(run), num_steps=1).gate_mass == {}


def test_directors_are_not_optimised_and_biases_not_decayed(make_dex):
    trainer = Trainer(make_dex())
    matrices, vectors = (group["params"] for group in trainer.optimiser.param_groups)
    names = {id(value): name for name, value in trainer.model.named_parameters()}
    decayed, free = ({names[id(value)] for value in group} for group in (matrices, vectors))
    assert not any(".director." in name for name in decayed | free)
    assert {f"{FIRST}.experts.weight_in", f"{FIRST}.experts.weight_out", f"{FIRST}.router.weight"} <= decayed
    assert {f"{FIRST}.experts.bias_in", f"{FIRST}.experts.bias_out"} <= free


def test_bf16_autocast_trains_too(make_dex, make_store, monkeypatch):
    run = make_dex()
    store = make_store(run)
    exact = train(Trainer(run), store, num_steps=2)
    monkeypatch.setattr("panfm.training.trainer._autocast", lambda _: torch.autocast("cpu", dtype=torch.bfloat16))
    mixed = train(Trainer(run), store, num_steps=2)
    assert mixed.num_skipped == 0
    assert mixed.loss == pytest.approx(exact.loss, rel=0.05)
    assert mixed.loss != exact.loss


@pytest.mark.slow
def test_training_lowers_the_loss(make_dex, make_store):
    run = make_dex()
    run = run.model_copy(update={"train": run.train.model_copy(update={"rounds": 1, "local_steps": 60})})
    seen = []
    train(Trainer(run), make_store(run, 24), num_steps=60, on_step=lambda _, loss: seen.append(loss))
    assert np.mean(seen[-10:]) < 0.95 * np.mean(seen[:10])
