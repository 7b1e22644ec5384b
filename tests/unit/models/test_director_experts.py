"""Director-Experts against the formulas of METHODS written as plain loops; exactness per subject; dense and back."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from panfm.errors import ConfigError
from panfm.models import build_model
from panfm.models.backbone import Exploration
from panfm.models.director_experts import (
    DirectorExperts,
    DirectorExpertsBackbone,
    Router,
    _CosineDistance,
    alignment_distance,
    balance_loss,
    layer_weight,
)
from panfm.models.dispatch import gather_experts, mix_experts
from panfm.models.tokens import pack
from panfm.models.transfer import director_run, director_state, start_from_dense
from tests.cases import quick

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
DEX = '[model]\nbackbone = "director-experts"\n[model.experts]\ncount = 4\n'


def make_layer(num_experts=5, num_active=2, *, width=6, hidden=8, seed=0):
    """All parameters random, so that no two experts are alike."""
    router = Router(width, num_experts=num_experts, num_active=num_active, temperature=0.5)
    layer = DirectorExperts(width, hidden, router)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.6, generator=generator)
        layer.router.activation.copy_(torch.rand(num_experts, generator=generator))
    return layer


def images(batch=7, length=4, width=6, seed=1):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def noise(scale=0.7, seed=3):
    return Exploration.of(scale, torch.Generator().manual_seed(seed))


def slow_mlp(token, weight_in, bias_in, weight_out, bias_out):
    hidden = weight_in @ token + bias_in
    hidden = hidden * 0.5 * (1.0 + torch.erf(hidden / math.sqrt(2.0)))
    return weight_out @ hidden + bias_out


def slow_expert(layer, r, token):
    experts = layer.experts
    return slow_mlp(token, experts.weight_in[r], experts.bias_in[r], experts.weight_out[r], experts.bias_out[r])


def slow_director(layer, token):
    first, _, second = layer.director
    return slow_mlp(token, first.weight, first.bias, second.weight, second.bias).detach()


def slow_forward(layer, x, exploration=None):
    """One subject, one expert, one token at a time. Returns probs, chosen, gates, outputs, mass."""
    num_experts = len(layer.router.activation)
    drawn = exploration.draw(torch.empty(len(x), num_experts)) if exploration else None
    probs, chosen, gates, outputs, mass = [], [], [], [], torch.zeros(num_experts)
    for b, subject in enumerate(x):
        logits = layer.router.weight @ subject[0]
        if exploration:
            freq = torch.stack([1.0 - c / layer.router.activation.sum() for c in layer.router.activation])
            logits = logits + exploration.scale * (drawn[b] + freq)
        exponent = torch.exp(logits / 0.5)
        share = exponent / exponent.sum()
        best = sorted(range(num_experts), key=lambda r: -share[r].item())[: layer.router.num_active]
        gate = [share[r] / sum(share[other] for other in best) for r in best]
        for r, value in zip(best, gate, strict=True):
            mass[r] += value.item()
        mixed = [sum(g * slow_expert(layer, r, token) for g, r in zip(gate, best, strict=True)) for token in subject]
        probs.append(share)
        chosen.append(best)
        gates.append(torch.stack(gate))
        outputs.append(torch.stack(mixed))
    return torch.stack(probs), torch.tensor(chosen), torch.stack(gates), torch.stack(outputs), mass


def slow_alignment(layer, outputs, x, kind):
    """Per subject, over all its tokens."""
    losses = []
    for output, subject in zip(outputs, x, strict=True):
        values = []
        for mine, token in zip(output, subject, strict=True):
            wanted = slow_director(layer, token.detach())
            if kind == "cosine":
                values.append(1.0 - (mine * wanted).sum() / (mine.norm() * wanted.norm()))
            else:
                values.append(-(torch.softmax(wanted / 0.5, 0) * torch.log(torch.softmax(mine, 0))).sum())
        losses.append(torch.stack(values).mean())
    return torch.stack(losses)


def slow_balance(probs):
    importance = [probs[:, r].mean() for r in range(probs.shape[1])]
    return len(importance) * sum(value * value.detach() for value in importance)


def gradients(layer, loss, **inputs):
    trained = {name: value for name, value in layer.named_parameters() if value.requires_grad} | inputs
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(trained.items(), found, strict=True)
    }


def assert_equal_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert_close(value, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


SHAPES = [(5, 2, 7), (8, 2, 1), (3, 3, 4), (1, 1, 3), (16, 4, 5)]


@pytest.mark.parametrize("exploring", [False, True])
@pytest.mark.parametrize(("num_experts", "num_active", "batch"), SHAPES)
def test_a_forward_pass_equals_the_formulas(num_experts, num_active, batch, exploring):
    layer, x = make_layer(num_experts, num_active), images(batch)
    found = layer(x, noise() if exploring else None)
    probs, chosen, gates, outputs, mass = slow_forward(layer, x, noise() if exploring else None)
    assert_close(found.probs, probs, **CLOSE)
    assert torch.equal(found.chosen, chosen)
    assert_close(found.gates, gates, **CLOSE)
    assert_close(found.outputs, outputs, **CLOSE)
    assert_close(found.mass(), mass, **CLOSE)


@pytest.mark.parametrize("kind", ["cosine", "softmax"])
@pytest.mark.parametrize("exploring", [False, True])
def test_losses_and_gradients_equal_the_formulas(kind, exploring):
    layer, x, up = make_layer(), images().requires_grad_(), images(seed=9)
    found = layer(x, noise() if exploring else None)
    probs, _, _, outputs, _ = slow_forward(layer, x, noise() if exploring else None)
    alignment = layer.alignment_loss(found, torch.ones(7, 4, dtype=torch.bool), kind)
    assert_close(alignment, slow_alignment(layer, outputs, x, kind), **CLOSE)
    balance = slow_balance(probs)
    assert_close(balance_loss(found.probs), balance, **CLOSE)
    mine = (found.outputs * up).sum() + alignment.sum() + balance_loss(found.probs)
    slow = (outputs * up).sum() + slow_alignment(layer, outputs, x, kind).sum() + balance
    assert_equal_gradients(gradients(layer, mine, x=x), gradients(layer, slow, x=x))


POOLS = [
    (num_experts, num_active)
    for num_experts in range(1, 9)
    for num_active in {1, 2, num_experts}
    if num_active <= num_experts
]


@pytest.mark.parametrize("kind", ["cosine", "softmax"])
@pytest.mark.parametrize(("num_experts", "num_active"), quick(POOLS, [(1, 1), (3, 2), (8, 8)]))
def test_after_several_updates_all_still_equals_the_formulas(num_experts, num_active, kind):
    """Router, experts, director and running activation take five steps twice: once here, once in the loops above."""
    layer = make_layer(num_experts, num_active)
    twin, drawn, again = deepcopy(layer), torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    for step in range(5):
        x, up, scale, momentum = images(3, 2, seed=step), images(3, 2, seed=100 + step), 1.0 - step / 5, 0.9 + step / 50
        found = layer(x, Exploration.of(scale, drawn))
        probs, chosen, _, outputs, mass = slow_forward(twin, x, Exploration.of(scale, again))
        assert torch.equal(found.chosen, chosen)
        assert_close(found.outputs, outputs, **CLOSE)
        alignment = layer.alignment_loss(found, torch.ones(3, 2, dtype=torch.bool), kind)
        loss = (found.outputs * up).mean() + alignment.mean() + balance_loss(found.probs)
        slow = (outputs * up).mean() + slow_alignment(twin, outputs, x, kind).mean() + slow_balance(probs)
        assert_close(loss, slow, **CLOSE)
        descend(layer, loss)
        descend(twin, slow)
        layer.move_director(found.mass(), momentum=momentum)
        layer.router.move_activation(found.mass())
        share = mass / mass.sum()
        with torch.no_grad():
            for director, stacked in zip(twin.director.parameters(), twin.experts.parameters(), strict=True):
                group = sum(share[r] * stacked[r] for r in range(num_experts))
                director.copy_(momentum * director + (1.0 - momentum) * group)
            twin.router.activation.copy_(0.99 * twin.router.activation + 0.01 * share)
        for name, value in layer.state_dict().items():
            assert_close(value, twin.state_dict()[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        assert_close(layer.router.activation, twin.router.activation, **CLOSE)


@torch.no_grad()
def descend(layer, loss):
    with torch.enable_grad():
        found = gradients(layer, loss)
    for name, gradient in found.items():
        layer.get_parameter(name).sub_(0.1 * gradient)


def test_by_hand():
    """Two experts that scale by 1 and 3, a router that sees the first feature; probs are e^(2 l) shares at tau 1/2."""
    layer = DirectorExperts(2, 2, Router(2, num_experts=2, num_active=2, temperature=0.5))
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[0.0, 0.0], [0.5 * math.log(3.0), 0.0]]))
        for parameter in layer.experts.parameters():
            parameter.zero_()
        layer.experts.bias_out.copy_(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
    routed = layer(torch.tensor([[[1.0, 5.0], [9.0, 9.0]]]))
    assert routed.chosen.tolist() == [[1, 0]]
    assert_close(routed.gates, torch.tensor([[0.75, 0.25]]))
    assert_close(routed.outputs, torch.tensor([[[2.5, 3.0], [2.5, 3.0]]]))
    assert balance_loss(routed.probs).item() == pytest.approx(2 * (0.75**2 + 0.25**2))
    assert alignment_distance(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 2.0]), "cosine").item() == 1.0
    assert [layer_weight(number, 4) for number in (1, 2, 3, 4)] == [1 / 4, 1 / 3, 1 / 2, 1]


def test_the_director_follows_the_experts_by_gate_mass():
    layer = make_layer()
    mass = torch.tensor([3.0, 0.0, 0.5, 0.0, 1.5])
    before = {name: value.clone() for name, value in layer.director.named_parameters()}
    names = {"0.weight": "weight_in", "0.bias": "bias_in", "2.weight": "weight_out", "2.bias": "bias_out"}
    layer.move_director(mass, momentum=0.9)
    for name, value in layer.director.named_parameters():
        stacked = getattr(layer.experts, names[name])
        group = sum(mass[r] / 5.0 * stacked[r] for r in range(5))
        assert_close(value, 0.9 * before[name] + 0.1 * group, **CLOSE)


def test_the_running_activation_follows_the_gate_mass():
    layer = make_layer()
    layer.router.reset_activation()
    layer.router.move_activation(torch.tensor([6.0, 0.0, 1.0, 0.0, 1.0]))
    expected = torch.tensor([0.75, 0.0, 0.125, 0.0, 0.125])
    assert_close(layer.router.activation, 0.99 * torch.full((5,), 0.2) + 0.01 * expected, **CLOSE)


def test_the_noise_of_the_first_two_steps_by_hand():
    """Two experts, even at first: both gain .5. After gate mass 3 and 1 they are at .5025 and .4975."""
    layer = make_layer(2, 1)
    layer.router.reset_activation()
    nothing = Exploration(1.0, torch.zeros_like)
    with torch.no_grad():
        layer.router.weight.zero_()
    assert_close(layer.router.logits(torch.zeros(1, 6), nothing), torch.tensor([[0.5, 0.5]]))
    layer.router.move_activation(torch.tensor([3.0, 1.0]))
    assert_close(layer.router.logits(torch.zeros(1, 6), nothing), torch.tensor([[0.4975, 0.5025]]))


def test_seldom_used_experts_are_explored_more():
    layer, x = make_layer(width=6), images(200)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.activation.copy_(torch.tensor([0.96, 0.01, 0.01, 0.01, 0.01]))
    mass = layer(x, noise(scale=1.0)).mass()
    assert mass[0] < 0.5 * mass[1:].mean()


def test_noise_comes_from_the_given_generator_alone():
    layer, x = make_layer(), images()
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, again, other = (layer(x, noise(seed=seed)).probs for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(layer(x, noise(scale=0.0)).probs, layer(x).probs)


@pytest.mark.parametrize("kind", ["cosine", "softmax"])
def test_gradients_of_single_subjects_sum_to_the_batchs(kind):
    layer, x, up = make_layer(), images(), images(seed=9)
    valid = torch.rand(7, 4, generator=torch.Generator().manual_seed(2)) < 0.6
    valid[:, 0] = True

    def loss(rows):
        routed = layer(x[rows])
        return (routed.outputs * up[rows]).sum() + layer.alignment_loss(routed, valid[rows], kind).sum()

    singles = [gradients(layer, loss([b])) for b in range(7)]
    summed = {name: sum(single[name] for single in singles) for name in singles[0]}
    assert_equal_gradients(gradients(layer, loss(list(range(7)))), summed)


def test_an_idle_expert_gets_a_zero_gradient_and_no_mass():
    layer = make_layer(8, 1)
    routed = layer(images(2))
    idle = [r for r in range(8) if r not in routed.chosen]
    assert len(idle) >= 6
    assert (routed.mass()[idle] == 0).all()
    for name, gradient in gradients(layer, routed.outputs.square().sum()).items():
        if name.startswith("experts."):
            assert (gradient[idle] == 0).all(), name
            assert (gradient[routed.chosen.flatten()] != 0).any(), name


def test_only_valid_tokens_are_aligned():
    layer, x = make_layer(), images()
    valid = torch.ones(7, 4, dtype=torch.bool)
    valid[:, 2:] = False
    expected = slow_alignment(layer, slow_forward(layer, x)[3][:, :2], x[:, :2], "cosine")
    assert_close(layer.alignment_loss(layer(x), valid, "cosine"), expected, **CLOSE)


def test_the_director_has_no_gradient():
    layer, x = make_layer(), images()
    routed = layer(x)
    (routed.outputs.sum() + layer.alignment_loss(routed, torch.ones(7, 4), "cosine").sum()).backward()
    assert all(not value.requires_grad and value.grad is None for value in layer.director.parameters())


@pytest.mark.parametrize("route", ["experts", "director"])
@torch.no_grad()
def test_an_untrained_model_is_the_dense_model(make_run, make_store, route):
    run = make_run(DEX)
    model, dense = build_model(run), build_model(director_run(run))
    batch = make_store(run, 6).batch(np.arange(6))
    assert_close(model.embed(batch, route=route), dense.embed(batch), **CLOSE)


@torch.no_grad()
def test_the_directors_are_a_dense_model(make_run, make_store):
    """Bit for bit, mixed streams and padding included."""
    run = make_run(DEX)
    model, dense = build_model(run), build_model(director_run(run))
    for index, parameter in enumerate(model.parameters()):
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    dense.load_state_dict(director_state(model), strict=True)
    batch = make_store(run, 6).batch(np.arange(6))
    assert torch.equal(model.embed(batch, route="director"), dense.embed(batch))
    assert not torch.equal(model.embed(batch), dense.embed(batch))
    assert torch.equal(dense.embed(batch, route="director"), dense.embed(batch))


@torch.no_grad()
def test_a_dense_model_starts_experts_and_comes_back(make_run, make_store):
    run = make_run(DEX)
    model, dense = build_model(run), build_model(director_run(run).model_copy(update={"seed": 99}))
    router = model.backbone.blocks[0].mlp.router.weight.clone()
    start_from_dense(model, dense.state_dict())
    batch = make_store(run, 6).batch(np.arange(6))
    assert_close(model.embed(batch), dense.embed(batch), **CLOSE)
    assert torch.equal(router, model.backbone.blocks[0].mlp.router.weight)
    back = director_state(model)
    assert back.keys() == dense.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in dense.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        start_from_dense(model, {"backbone.cls": torch.zeros(48)})


@torch.no_grad()
def test_an_embedding_through_experts_does_not_depend_on_the_rest_of_the_batch(make_run, make_store):
    run = make_run(DEX)
    model, store = build_model(run), make_store(run, 9)
    for index, parameter in enumerate(model.parameters()):
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    together = model.embed(store.batch(np.arange(9)))
    for subject in range(9):
        assert_close(model.embed(store.batch([subject]))[0], together[subject], **CLOSE)


def test_names_and_shapes(make_run):
    run = make_run('[model]\nbackbone = "director-experts"\nhidden-multiple = 2\n[model.experts]\ncount = [4, 3]\n')
    model = build_model(run)
    names = {name: tuple(value.shape) for name, value in model.state_dict().items() if ".blocks.1.mlp." in name}
    prefix = "backbone.blocks.1.mlp."
    assert names == {
        prefix + "director.0.weight": (96, 48),
        prefix + "director.0.bias": (96,),
        prefix + "director.2.weight": (48, 96),
        prefix + "director.2.bias": (48,),
        prefix + "experts.weight_in": (3, 96, 48),
        prefix + "experts.bias_in": (3, 96),
        prefix + "experts.weight_out": (3, 48, 96),
        prefix + "experts.bias_out": (3, 48),
        prefix + "router.weight": (3, 48),
    }
    assert list(model.director_experts()) == ["backbone.blocks.0.mlp", "backbone.blocks.1.mlp"]
    assert build_model(make_run()).director_experts() == {}


@pytest.mark.parametrize(
    ("experts", "complaint"),
    [
        ("count = [4, 4, 4]", "model.experts.count: 3 numbers, expected one, or one for each of 2 blocks"),
        ("active = [2, 9]", "model.experts.active: 9 in block 1, expected at most count = 8"),
    ],
)
def test_experts_that_do_not_fit_the_blocks_are_refused(make_run, experts, complaint):
    with pytest.raises(ConfigError) as caught:
        build_model(make_run(f'[model]\nbackbone = "director-experts"\n[model.experts]\n{experts}\n'))
    assert str(caught.value) == complaint


@torch.no_grad()
def test_a_subject_without_any_token_goes_through_experts_too(make_run):
    backbone = DirectorExpertsBackbone(12, 2, 3, make_run(DEX).model)
    for parameter in backbone.parameters():
        parameter.fill_(0.1)
    empty = pack(torch.tensor([[False, False]]), torch.tensor([0, 1]))
    encoded = backbone(torch.zeros(1, 0, 12), empty)
    assert torch.isfinite(encoded.cls).all()
    assert encoded.routed[0].outputs.shape == (1, 1, 12)


@pytest.mark.parametrize(("num_experts", "num_active", "batch"), quick([(3, 3, 4), (5, 2, 7), (8, 1, 2)], 1))
def test_the_gradient_of_a_mixture_is_that_of_finite_differences(num_experts, num_active, batch):
    """Of inputs, gates, and all experts, idle ones too."""
    layer, x = make_layer(num_experts, num_active).double(), images(batch).double().requires_grad_()
    routed = layer(x)
    stacked = tuple(layer.experts.parameters())
    gates = routed.gates.detach().requires_grad_()
    torch.autograd.gradcheck(lambda x, gates, *four: mix_experts(x, routed.chosen, gates, four), (x, gates, *stacked))


@pytest.mark.parametrize("batch", [1, 6])
def test_both_ways_through_the_experts_mix_the_same(batch):
    layer, x, up = make_layer(), images(batch).requires_grad_(), images(batch, seed=9)
    routed = layer(x)
    gates = routed.gates.detach().requires_grad_()
    found = []
    for mix in (gather_experts, mix_experts):
        mixed = mix(x, routed.chosen, gates, layer.experts.stacked)
        found.append([mixed, *torch.autograd.grad((mixed * up).sum(), [x, gates, *layer.experts.parameters()])])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, **CLOSE)


def test_a_mixture_refuses_a_gradient_of_its_gradient():
    layer, x = make_layer(), images().requires_grad_()
    (first,) = torch.autograd.grad(layer(x).outputs.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_batch_of_nobody_has_no_outputs():
    layer = make_layer()
    routed = layer(images(0))
    assert routed.outputs.shape == (0, 4, 6)
    routed.outputs.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in layer.experts.parameters())


def test_outputs_of_length_zero_have_a_distance_and_a_gradient():
    outputs = torch.zeros(2, 3, requires_grad=True)
    distance = alignment_distance(outputs, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), "cosine")
    assert distance.tolist() == [1.0, 1.0]
    distance.sum().backward()
    assert torch.isfinite(outputs.grad).all()


@pytest.mark.parametrize("scale", [1.0, 1e-9, 0.0])
def test_the_gradient_of_the_cosine_is_that_of_autograd(scale):
    """Of lengths below the floor, too; alone and under vmap, as privacy takes it."""
    outputs, target = (scale * images(3).double()).requires_grad_(), images(3, seed=2).double()
    weights = torch.arange(12.0).view(3, 4).double()

    def slow(outputs, target):
        lengths = [each.square().sum(dim=-1).add(1e-300).sqrt().clamp_min(1e-8) for each in (outputs, target)]
        return 1.0 - (outputs * target).sum(dim=-1) / (lengths[0] * lengths[1])

    def fast(outputs, target):
        return _CosineDistance.apply(outputs, target)[0]

    assert_close(fast(outputs, target), slow(outputs, target))
    (expected,) = torch.autograd.grad((weights * slow(outputs, target)).sum(), outputs)
    (found,) = torch.autograd.grad((weights * fast(outputs, target)).sum(), outputs)
    assert_close(found, expected)

    def one(outputs, target, weights):
        return (weights * fast(outputs, target)).sum()

    assert_close(torch.func.vmap(torch.func.grad(one))(outputs.detach(), target, weights), expected)


def test_the_cosine_refuses_a_gradient_of_its_gradient():
    outputs = images().requires_grad_()
    (first,) = torch.autograd.grad(
        alignment_distance(outputs, images(seed=2), "cosine").sum(), outputs, create_graph=True
    )
    assert not first.requires_grad


def test_routing_keeps_its_precision_under_autocast():
    layer, x = make_layer(), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer(x)
    assert mixed.probs.dtype == torch.float32
    assert torch.equal(mixed.probs, layer(x).probs)
    assert mixed.outputs.dtype == torch.bfloat16
    assert functional.mse_loss(mixed.outputs.float(), layer(x).outputs) < 1e-2
    found, expected = (gradients(layer, routed.outputs.float().square().sum()) for routed in (mixed, layer(x)))
    for name in (name for name in found if name.startswith("experts.")):
        assert found[name].dtype == torch.float32
        assert (found[name] - expected[name]).norm() < 0.02 * expected[name].norm()
