"""Activations that are computed a second time: the same bits, and fewer numbers kept for the backward pass."""

import numpy as np
import pytest
import torch

from panfm.errors import ConfigError
from panfm.models.backbone import Backbone
from panfm.models.sizes import sizes_of
from panfm.training.trainer import Trainer

EXPERTS = '[model]\nbackbone = "director-experts"\nexperts = { count = 4, active = 2 }\n'
RUNS = {
    "latent": "",
    "mae": '[objective]\nname = "mae"\n',
    "dino": '[objective]\nname = "dino"\n',
    "views": '[objective]\nname = "view-regression"\n[augment]\n',
    "experts": EXPERTS,
    "registers": "[model]\nregisters = 2\nlayer-scale = true\n",
}


def recomputed(run):
    return run.model_copy(update={"train": run.train.model_copy(update={"activations": "recomputed"})})


def trained(run, store):
    """State after two rounds, and the bytes that were kept for the backward passes outside of blocks that are
    computed again."""
    kept = []

    def pack(value):
        kept.append(value.numel() * value.element_size())
        return value

    trainer, everyone = Trainer(run), np.arange(len(store.subjects))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        for number in (1, 2):
            steps = {"first_step": 3 * (number - 1), "num_steps": 3, "site": "a", "round_number": number}
            result = trainer.train(store, everyone, **steps)
    return trainer.shared_state() | trainer.private_state(), result, sum(kept)


@pytest.mark.parametrize("extra", RUNS.values(), ids=RUNS)
def test_the_bits_are_the_same_and_less_is_kept(make_run, make_store, extra):
    run = make_run(extra)
    store = make_store(run)
    state, result, kept = trained(run, store)
    other, told, less = trained(recomputed(run), store)
    assert state.keys() == other.keys()
    assert all(torch.equal(other[name], value) for name, value in state.items())
    assert told == result
    assert less < 0.7 * kept


def test_the_estimate_of_a_step_is_smaller(make_run):
    run = make_run('[model]\nsize = "tiny"\n')
    assert sizes_of(recomputed(run)).step_bytes < sizes_of(run).step_bytes
    assert sizes_of(recomputed(run)).parameters == sizes_of(run).parameters


def test_a_backbone_that_keeps_its_activations_says_so(make_run, monkeypatch):
    monkeypatch.setattr("panfm.models.vit.VisionTransformer.recompute", Backbone.recompute)
    with pytest.raises(ConfigError, match=r'train\.activations: .* expected "kept"'):
        Trainer(recomputed(make_run()))
