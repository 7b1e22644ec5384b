"""The layers of the released code, against numbers worked out by hand."""

import pytest
import torch
from torch.testing import assert_close

from panfm.models import build_model
from panfm.models.director_experts import DirectorExperts, Exploration
from panfm.training.trainer import Trainer
from simulations.studies._modalities import Pictures
from simulations.studies._released import ActivationFromZero, DirectorFirst, Released, use_layers
from simulations.studies.dex import RELEASED, arm_run, exchange_layers

QUIET = Exploration(1.0, torch.zeros_like)
"""Exploration without its random part: what is left favours experts that are seldom active."""


def make_layer(kind):
    layer = kind(2, 2, num_experts=2, num_active=1, temperature=1.0)
    for parameter in layer.parameters():
        parameter.detach().zero_()
    return layer


@pytest.mark.parametrize("kind", [ActivationFromZero, Released])
def test_the_activation_starts_at_zero_and_is_the_first_batchs_share_after_it(kind):
    """c: 0, then .01 (.75, .25), then .99 (.0075, .0025) + .01 (0, 1) = (.007425, .012475), which sum to .0199."""
    layer = make_layer(kind)
    assert layer.activation.tolist() == [0.0, 0.0]
    cls = torch.zeros(1, 2)
    assert layer._logits(cls, QUIET).tolist() == [[0.0, 0.0]]
    layer.move_activation(torch.tensor([3.0, 1.0]))
    assert_close(layer._logits(cls, QUIET), torch.tensor([[0.25, 0.75]]))
    layer.move_activation(torch.tensor([0.0, 5.0]))
    assert_close(layer.activation, torch.tensor([0.007425, 0.012475]))
    assert_close(layer._logits(cls, QUIET), 1.0 - torch.tensor([[0.007425, 0.012475]]) / 0.0199)


@pytest.mark.parametrize(
    ("kind", "expected"), [(DirectorExperts, 0.4), (ActivationFromZero, 0.4), (DirectorFirst, 0.8), (Released, 0.8)]
)
def test_the_director_follows_the_experts_of_before_or_after_the_step(picture_cohort, monkeypatch, kind, expected):
    """Experts at 2 before the step and 1 after it, director at 0, momentum .6: .4 x 2 before, .4 x 1 after."""
    run = arm_run(0, "dex", 1)
    experts = run.model.experts.model_copy(update={"director_momentum": (0.6, 0.6)})
    run = run.model_copy(update={"model": run.model.model_copy(update={"experts": experts})})
    trainer, store = Trainer(run), Pictures.open(picture_cohort, run).together.store
    use_layers(trainer.model, kind)
    names = set(trainer.model.state_dict())

    def set_experts(number):
        for layer in trainer.model.director_experts().values():
            for parameter in layer.experts.parameters():
                parameter.detach().fill_(number)

    def to_one():
        set_experts(1.0)

    set_experts(2.0)
    for layer in trainer.model.director_experts().values():
        for parameter in layer.director.parameters():
            parameter.zero_()
    monkeypatch.setattr(trainer.optimiser, "step", to_one)
    trainer.train(store, store.indices("train"), first_step=0, num_steps=1, site="a", round_number=1)
    for layer in trainer.model.director_experts().values():
        assert all(bool((parameter == 1.0).all()) for parameter in layer.experts.parameters())
        for parameter in layer.director.parameters():
            assert_close(parameter, torch.full_like(parameter, expected))
    assert set(trainer.model.state_dict()) == names


def test_arms_have_the_layers_they_name():
    for arm, kind in {**RELEASED, "dex": DirectorExperts}.items():
        model = build_model(arm_run(0, arm, 1))
        exchange_layers(model, arm, 0)
        assert {type(layer) for layer in model.director_experts().values()} == {kind}
    assert {arm: kind.__name__ for arm, kind in RELEASED.items()} == {
        "dex-activation-zero": "ActivationFromZero",
        "dex-director-first": "DirectorFirst",
        "dex-released": "Released",
    }
