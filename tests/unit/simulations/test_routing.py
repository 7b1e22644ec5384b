import pytest
import torch

from panfm.data.store import Batch
from panfm.models import build_model
from panfm.models.director_experts import DirectorExpertsBackbone, Router
from panfm.models.tokens import Layout
from simulations.studies._modalities import study_run, with_backbone
from simulations.studies._routing import RandomlyRouted, RandomRouter, TokenRouter, content_keys, seed_routing

STREAM = "chest-xray"


def model_of(backbone, seed=7):
    run = with_backbone(study_run(5, steps=1), backbone)
    built = build_model(run, [STREAM, "abdomen-ct"])
    seed_routing(built, seed)
    generator = torch.Generator().manual_seed(0)
    for layer in built.director_experts().values():
        for parameter in layer.experts.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return built


def batch(number: int, seed: int = 1) -> Batch:
    images = torch.rand(number, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    return Batch(number, {STREAM: images}, {STREAM: torch.arange(number)})


@pytest.fixture
def random_model():
    return model_of("random-routing")


def test_a_token_is_routed_as_a_picture_of_one_token():
    by_images, by_tokens = model_of("director-experts"), model_of("token-routing")
    by_tokens.load_state_dict(by_images.state_dict())
    layer = next(iter(by_images.director_experts().values()))
    x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(2))
    by_image = [[layer(x[i : i + 1, t : t + 1]).outputs for t in range(5)] for i in range(3)]
    layer = next(iter(by_tokens.director_experts().values()))
    assert isinstance(layer.router, TokenRouter)
    routed = layer(x)
    expected = torch.cat([torch.cat(row, dim=1) for row in by_image])
    torch.testing.assert_close(routed.outputs, expected, atol=1e-5, rtol=1e-5)
    assert routed.chosen.shape == (15, 2)
    assert routed.inputs.shape == x.shape
    assert routed.mass().sum().item() == pytest.approx(15.0, rel=1e-5)
    assert len(set(map(tuple, routed.chosen.tolist()))) > 1


def test_random_gates_depend_on_the_picture_alone(random_model):
    model = random_model
    features = model.patch_features(batch(6))
    alone = Batch(1, {STREAM: features.images[STREAM][4:5]}, {STREAM: torch.tensor([0])})
    with torch.no_grad():
        together, by_itself = model.encode(features).routed, model.encode(alone).routed
        for parameter in model.parameters():
            parameter.mul_(1.5)
        moved = model.encode(features).routed
    for all_six, one, later in zip(together, by_itself, moved, strict=True):
        assert torch.equal(all_six.gates[4:5], one.gates)
        assert torch.equal(all_six.chosen[4:5], one.chosen)
        assert torch.equal(all_six.gates, later.gates)
    first, second = together
    assert len(set(map(tuple, first.chosen.tolist()))) > 1
    assert not torch.equal(first.gates, second.gates)


def test_random_gates_follow_the_seed(random_model):
    model = random_model
    features = model.patch_features(batch(6))
    seven = model.encode(features).routed[0].gates
    seed_routing(model, 8)
    assert not torch.equal(model.encode(features).routed[0].gates, seven)


def test_a_router_that_is_passed_by_does_not_learn(random_model):
    model = random_model
    model.embed(batch(4)).square().sum().backward()
    for layer in model.director_experts().values():
        assert isinstance(layer.router, RandomRouter)
        assert layer.router.weight.grad is None
        assert layer.experts.weight_in.grad.abs().sum() > 0


def test_a_seed_for_routing_changes_no_other_model():
    model = model_of("director-experts", seed=7)
    assert {type(layer.router) for layer in model.director_experts().values()} == {Router}
    assert type(model.backbone) is DirectorExpertsBackbone
    before = model.embed(batch(4))
    seed_routing(model, 8)
    assert torch.equal(model.embed(batch(4)), before)


def test_random_routing_sees_whole_pictures_whatever_is_hidden(random_model):
    features = random_model.patch_features(batch(3))
    layout = random_model.layout(features)
    tokens = random_model.tokenize(features, layout)
    assert isinstance(random_model.backbone, RandomlyRouted)
    whole = random_model.backbone(tokens, layout).routed
    part = random_model.backbone(tokens[:, :5], Layout(layout.patch_index[:, :5], layout.valid[:, :5])).routed
    assert all(torch.equal(one.gates, other.gates) for one, other in zip(whole, part, strict=True))


def test_keys_tell_pictures_apart_whatever_their_place():
    one, other = content_keys(batch(2)), content_keys(batch(3))
    assert one == other[:2]
    assert len(set(other)) == 3
