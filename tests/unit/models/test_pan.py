"""The model's guarantees: independence of the batch and of padding, absent streams, seeding by name."""

import itertools

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from panfm.data.store import Batch
from panfm.models import build_model
from panfm.models.patch_features import patchify
from panfm.models.tokens import sincos_positions

STREAMS = ("brain-mr", "heart-ct", "eye-fundus")
SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations(STREAMS, size)]


@pytest.fixture(params=["statistics", "texture", "patch"])
def run(request, make_run):
    return make_run(f'[model]\ntokenizer = "{request.param}"\n')


@torch.no_grad()
def test_an_embedding_does_not_depend_on_the_rest_of_the_batch(run, make_store):
    model, store = build_model(run).double(), make_store(run, 12)
    together = model.embed(double(store.batch(np.arange(12))))
    for subject in range(12):
        alone = model.embed(double(store.batch([subject])))
        assert_close(alone[0], together[subject], atol=1e-10, rtol=1e-8)


@torch.no_grad()
def test_an_embedding_is_the_same_in_any_order(run, make_store):
    model, store = build_model(run).double(), make_store(run, 8)
    order = np.random.default_rng(0).permutation(8)
    shuffled = model.embed(double(store.batch(order)))
    assert_close(shuffled, model.embed(double(store.batch(np.arange(8))))[order], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("subset", SUBSETS)
@torch.no_grad()
def test_any_subset_of_streams_is_a_valid_input(run, make_store, subset):
    model, store = build_model(run), make_store(run, 4, complete=True)
    embedding = model.embed(store.batch(np.arange(4), subset))
    assert embedding.shape == (4, model.width)
    assert torch.isfinite(embedding).all()


@torch.no_grad()
def test_a_token_is_its_patch_its_stream_and_its_position(run, make_store):
    model, store = build_model(run), make_store(run, 3, complete=True)
    features = model.patch_features(store.batch(np.arange(3)))
    tokens = model.tokenize(features, model.layout(features))
    tokenizer, config = model.streams["heart-ct"], run.streams["heart-ct"]
    patches = patchify(features.images["heart-ct"], tokenizer.step)
    positions = 0.2 * sincos_positions(config.grid, model.width)
    expected = patches @ tokenizer.project.weight.T + tokenizer.project.bias + tokenizer.embedding + positions
    assert_close(tokens[:, model.stream_of_patch == 1], expected)


@torch.no_grad()
def test_streams_matter(run, make_store):
    model, store = build_model(run), make_store(run, 4, complete=True)
    whole, part = (model.embed(store.batch(np.arange(4), streams)) for streams in (STREAMS, STREAMS[:2]))
    assert (whole - part).abs().max() > 1e-3


@torch.no_grad()
def test_absent_streams_are_not_computed(run, make_store):
    model, store = build_model(run), make_store(run, 5, complete=True)
    layout = model.layout(store.batch(np.arange(5), ("heart-ct",)))
    assert layout.patch_index.shape[1] == 2
    model.streams["brain-mr"].forward = None
    model.embed(store.batch(np.arange(5), ("heart-ct",)))


@torch.no_grad()
def test_a_site_with_fewer_streams_agrees_with_the_whole_model(run, make_store):
    whole, part = build_model(run), build_model(run, ["heart-ct"])
    shared = dict(whole.named_parameters())
    assert set(dict(part.named_parameters())) < set(shared)
    for name, parameter in part.named_parameters():
        assert torch.equal(parameter, shared[name]), name
    batch = make_store(run, 6, complete=True).batch(np.arange(6), ("heart-ct",))
    assert_close(part.embed(batch), whole.embed(batch))


def test_weights_follow_the_seed(run):
    first, again = build_model(run), build_model(run)
    other = build_model(run.model_copy(update={"seed": 8}))
    weights = [model.backbone.blocks[0].mlp[0].weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_hidden_queries_stand_in_the_order_of_places(run):
    model = build_model(run)
    assert model.hidden_queries().shape == (len(model.stream_of_patch), model.width)
    assert model.stream_of_patch.tolist() == [0] * 4 + [1] * 2 + [2] * 4


def double(batch: Batch) -> Batch:
    return Batch(batch.size, {name: image.double() for name, image in batch.images.items()}, batch.rows)


def test_a_batch_is_embedded_where_the_model_is(make_run, make_store, monkeypatch):
    """Images are read to the host's memory, the model may be elsewhere."""
    run, seen = make_run(), []
    model, batch = build_model(run), make_store(run, 3).batch([0, 1])
    monkeypatch.setattr(Batch, "to", lambda batch, device: seen.append(device) or batch)
    model.embed(batch)
    assert seen == [model.backbone.cls.device]
