"""The bench's naive layers are the same method, written another way."""

import numpy as np
import torch
from torch.testing import assert_close

from panfm.training.trainer import Trainer
from simulations.bench.dex_step import naive_run


@torch.no_grad()
def test_naive_layers_do_what_the_librarys_do(make_run, make_store):
    run = make_run('[model]\nbackbone = "director-experts"\nexperts.count = 5\n[objective]\nname = "mae"\n')
    mine, naive = (
        trainer.model.director_experts()["backbone.blocks.0.mlp"] for trainer in (Trainer(run), Trainer(naive_run(run)))
    )
    generator = torch.Generator().manual_seed(0)
    for stacked, *each in zip(
        mine.experts.parameters(), *(expert.parameters() for expert in naive.experts.experts), strict=True
    ):
        stacked.normal_(0.0, 0.3, generator=generator)
        for index, parameter in enumerate(each):
            parameter.copy_(stacked[index])
    x = torch.randn(7, 3, 48, generator=generator)
    assert_close(mine(x).outputs, naive(x).outputs, atol=1e-5, rtol=1e-5)
    before = mine.director[0].weight.clone()
    for layer in (mine, naive):
        layer.move_director(torch.tensor([3.0, 0.0, 1.0, 2.5, 0.5]), momentum=0.6)
    assert not torch.equal(before, mine.director[0].weight)
    for first, second in zip(mine.director.parameters(), naive.director.parameters(), strict=True):
        assert_close(first, second, atol=1e-6, rtol=1e-5)


def test_naive_layers_train(make_run, make_store):
    run = make_run('[model]\nbackbone = "director-experts"\n[objective]\nname = "mae"\n')
    trainer = Trainer(naive_run(run))
    result = trainer.train(make_store(run), np.arange(12), first_step=0, num_steps=2, site="a", round_number=1)
    assert result.num_skipped == 0
    assert np.isfinite(result.loss)
