"""The layers of the released code, against numbers worked out by hand."""

import pytest
import torch
from torch.testing import assert_close

from panfm.models import build_model
from panfm.models.backbone import Exploration
from panfm.models.director_experts import DirectorExperts, DirectorExpertsBackbone, Router
from panfm.registry import BACKBONES
from panfm.training.trainer import Trainer
from simulations.studies._modalities import Pictures, with_backbone
from simulations.studies._released import (
    ActivationFromZero,
    DirectorFirst,
    EarlyDirectorExperts,
    Released,
    RouterFromZero,
)
from simulations.studies.dex_study import RELEASED, arm_run

QUIET = Exploration(1.0, torch.zeros_like)
"""Exploration without its random part: what is left favours experts that are seldom active."""


def make_layer(kind):
    layer = kind.layer_class(2, 2, kind.router_class(2, num_experts=2, num_active=1, temperature=1.0))
    for parameter in layer.parameters():
        parameter.detach().zero_()
    return layer


@pytest.mark.parametrize("kind", [ActivationFromZero, Released])
def test_the_activation_starts_at_zero_and_is_the_first_batchs_share_after_it(kind):
    """c: 0, then .01 (.75, .25), then .99 (.0075, .0025) + .01 (0, 1) = (.007425, .012475), which sum to .0199."""
    layer = make_layer(kind).router
    assert layer.activation.tolist() == [0.0, 0.0]
    cls = torch.zeros(1, 2)
    assert layer.logits(cls, QUIET).tolist() == [[0.0, 0.0]]
    layer.move_activation(torch.tensor([3.0, 1.0]))
    assert_close(layer.logits(cls, QUIET), torch.tensor([[0.25, 0.75]]))
    layer.move_activation(torch.tensor([0.0, 5.0]))
    assert_close(layer.activation, torch.tensor([0.007425, 0.012475]))
    assert_close(layer.logits(cls, QUIET), 1.0 - torch.tensor([[0.007425, 0.012475]]) / 0.0199)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(DirectorExpertsBackbone, 0.4), (ActivationFromZero, 0.4), (DirectorFirst, 0.8), (Released, 0.8)],
)
def test_the_director_follows_the_experts_of_before_or_after_the_step(picture_cohort, monkeypatch, kind, expected):
    """Experts at 2 before the step and 1 after it, director at 0, momentum .6: .4 x 2 before, .4 x 1 after."""
    (backbone,) = (name for name in ("director-experts", *RELEASED) if BACKBONES.load(name) is kind)
    run = with_backbone(arm_run(0, "dex", 1), backbone)
    experts = run.model.experts.model_copy(update={"director_momentum": (0.6, 0.6)})
    run = run.model_copy(update={"model": run.model.model_copy(update={"experts": experts})})
    trainer, store = Trainer(run), Pictures.open(picture_cohort, run).together.store
    assert type(trainer.model.backbone) is kind
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
    parts = {
        "dex": (DirectorExperts, Router),
        "dex-activation-zero": (DirectorExperts, RouterFromZero),
        "dex-director-first": (EarlyDirectorExperts, Router),
        "dex-released": (EarlyDirectorExperts, RouterFromZero),
    }
    for arm, expected in parts.items():
        model = build_model(arm_run(0, arm, 1))
        assert {(type(layer), type(layer.router)) for layer in model.director_experts().values()} == {expected}
    assert {arm: kind.__name__ for arm, kind in RELEASED.items()} == {
        "dex-activation-zero": "ActivationFromZero",
        "dex-director-first": "DirectorFirst",
        "dex-released": "Released",
    }
