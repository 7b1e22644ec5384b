import pytest
import torch

from panfm.data.store import Batch
from panfm.errors import RunError
from panfm.export.network import EmbeddingNetwork, batch_of, random_inputs, require_equal
from panfm.models import build_model

DEX = '[model]\nbackbone = "director-experts"\nexperts = { count = [5, 3], active = [2, 1] }\n'


def model_with_spread_experts(run):
    model, generator = build_model(run).eval(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_random_inputs_hold_every_case_and_are_always_the_same(make_run):
    streams = make_run().streams
    *images, present = random_inputs(streams)
    assert [tuple(image.shape[1:]) for image in images] == [(1, 8, 8, 4), (1, 8, 4, 4), (3, 8, 8)]
    assert present.int().tolist() == [[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert all(torch.equal(*pair) for pair in zip(random_inputs(streams), (*images, present), strict=True))


def test_a_batch_holds_what_is_present_by_hand(make_run):
    images = [torch.arange(3.0)[:, None], 10 + torch.arange(3.0)[:, None], torch.zeros(3, 1)]
    present = torch.tensor([[True, False, False], [True, True, False], [False, True, False]])
    batch = batch_of(("a", "b", "c"), (*images, present))
    assert batch.size == 3
    assert {name: rows.tolist() for name, rows in batch.rows.items()} == {"a": [0, 1], "b": [1, 2]}
    assert {name: image.flatten().tolist() for name, image in batch.images.items()} == {"a": [0, 1], "b": [11, 12]}


@pytest.mark.parametrize("tokenizer", ["statistics", "texture", "patch"])
@pytest.mark.parametrize("backbone", ["", DEX])
@pytest.mark.parametrize("streams", [("brain-mr", "heart-ct", "eye-fundus"), ("eye-fundus", "brain-mr"), ("heart-ct",)])
def test_the_network_embeds_as_the_model(make_run, backbone, tokenizer, streams):
    run = make_run(backbone or "[model]\n")
    run = run.model_copy(update={"model": run.model.model_copy(update={"tokenizer": tokenizer})})
    model = model_with_spread_experts(run)
    network = EmbeddingNetwork(model, streams).eval()
    inputs = random_inputs(network.configs)
    with torch.inference_mode():
        assert require_equal(model.embed(batch_of(streams, inputs)), network(*inputs)) < 1e-5


@pytest.mark.parametrize("pooling", ["cls+mean", "per-stream", "layers", "per-stream-layers"])
@pytest.mark.parametrize("streams", [("brain-mr", "heart-ct", "eye-fundus"), ("eye-fundus", "brain-mr")])
def test_the_network_pools_as_the_model(make_run, pooling, streams):
    model = model_with_spread_experts(make_run(f'[features]\npooling = "{pooling}"\n'))
    network = EmbeddingNetwork(model, streams).eval()
    inputs = random_inputs(network.configs)
    with torch.inference_mode():
        assert require_equal(model.embed(batch_of(streams, inputs)), network(*inputs)) < 1e-5
        assert network(*inputs).shape[1] == model.embedding_size


def test_what_is_absent_changes_nothing(make_run):
    network = EmbeddingNetwork(model_with_spread_experts(make_run(DEX)), ("brain-mr", "heart-ct", "eye-fundus"))
    *images, present = random_inputs(network.configs)
    broken = [
        image.masked_fill(~present[:, column].view(-1, *[1] * (image.dim() - 1)), float("nan"))
        for column, image in enumerate(images)
    ]
    with torch.inference_mode():
        assert torch.equal(network(*images, present), network(*broken, present))


def test_a_subject_with_nothing_is_its_cls_alone(make_run):
    model = model_with_spread_experts(make_run())
    network = EmbeddingNetwork(model, ("heart-ct",))
    image = torch.zeros(1, 1, 8, 4, 4)
    with torch.inference_mode():
        alone = model.embed(Batch(1, {}, {}))
        assert torch.allclose(network(image, torch.tensor([[False]])), alone, atol=1e-6)
        assert not torch.allclose(network(image, torch.tensor([[True]])), alone, atol=1e-3)


@pytest.mark.parametrize("change", [1.1e-5, -1.0, float("nan"), float("inf")])
def test_a_difference_is_refused(change):
    expected = torch.zeros(2, 3)
    found = expected.clone()
    found[1, 2] = change
    with pytest.raises(RunError, match="differs from the run's model by"):
        require_equal(expected, found)
    assert require_equal(expected, expected + 0.9e-5) < 1e-5
