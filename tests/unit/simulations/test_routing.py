import pytest
import torch

from panfm.data.store import Batch
from panfm.models import build_model
from panfm.models.director_experts import DirectorExperts
from simulations.studies._modalities import study_run
from simulations.studies._routing import RandomlyRouted, TokenRouted, content_keys, reroute

STREAM = "chest-xray"


@pytest.fixture
def model():
    built = build_model(study_run(5, steps=1), [STREAM, "abdomen-ct"])
    generator = torch.Generator().manual_seed(0)
    for layer in built.director_experts().values():
        for parameter in layer.experts.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return built


def batch(number: int, seed: int = 1) -> Batch:
    images = torch.rand(number, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    return Batch(number, {STREAM: images}, {STREAM: torch.arange(number)})


def test_a_token_is_routed_as_a_picture_of_one_token(model):
    layer = next(iter(model.director_experts().values()))
    x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(2))
    by_image = [[layer(x[i : i + 1, t : t + 1]).outputs for t in range(5)] for i in range(3)]
    reroute(model, "token", 0)
    assert isinstance(layer, TokenRouted)
    routed = layer(x)
    expected = torch.cat([torch.cat(row, dim=1) for row in by_image])
    torch.testing.assert_close(routed.outputs, expected, atol=1e-5, rtol=1e-5)
    assert routed.chosen.shape == (15, 2)
    assert routed.inputs.shape == x.shape
    assert routed.mass().sum().item() == pytest.approx(15.0, rel=1e-5)
    assert len(set(map(tuple, routed.chosen.tolist()))) > 1


def test_random_gates_depend_on_the_picture_alone(model):
    reroute(model, "random", 7)
    maps = model.stem(batch(6))
    alone = Batch(1, {STREAM: maps.images[STREAM][4:5]}, {STREAM: torch.tensor([0])})
    with torch.no_grad():
        together, by_itself = model.encode(maps).routed, model.encode(alone).routed
        for parameter in model.parameters():
            parameter.mul_(1.5)
        moved = model.encode(maps).routed
    for all_six, one, later in zip(together, by_itself, moved, strict=True):
        assert torch.equal(all_six.gates[4:5], one.gates)
        assert torch.equal(all_six.chosen[4:5], one.chosen)
        assert torch.equal(all_six.gates, later.gates)
    first, second = together
    assert len(set(map(tuple, first.chosen.tolist()))) > 1
    assert not torch.equal(first.gates, second.gates)


def test_random_gates_follow_the_seed(model):
    reroute(model, "random", 7)
    maps = model.stem(batch(6))
    seven = model.encode(maps).routed[0].gates
    model.seed = 8
    assert not torch.equal(model.encode(maps).routed[0].gates, seven)


def test_a_router_that_is_passed_by_does_not_learn(model):
    reroute(model, "random", 7)
    model.embed(batch(4)).square().sum().backward()
    for layer in model.director_experts().values():
        assert isinstance(layer, RandomlyRouted)
        assert layer.router.weight.grad is None
        assert layer.experts.weight_in.grad.abs().sum() > 0


def test_image_routing_changes_nothing(model):
    before = model.embed(batch(4))
    reroute(model, "image", 7)
    assert {type(layer) for layer in model.director_experts().values()} == {DirectorExperts}
    assert torch.equal(model.embed(batch(4)), before)


def test_keys_tell_pictures_apart_whatever_their_place():
    one, other = content_keys(batch(2)), content_keys(batch(3))
    assert one == other[:2]
    assert len(set(other)) == 3
