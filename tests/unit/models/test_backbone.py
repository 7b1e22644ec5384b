"""Sharing groups are found by walking a model's modules; what has none is refused."""

import pytest
import torch
from torch import nn

from panfm.anatomy import module_name
from panfm.errors import ConfigError, ProtocolError
from panfm.models import build_model, describe_model
from panfm.models.backbone import PerStream, parameter_groups
from panfm.models.director_experts import DirectorExperts, Router
from panfm.registry import BACKBONES

DEX = '[model]\nbackbone = "director-experts"\n'


class Tagged(nn.Linear):
    sharing_group = "head"


class Closed(nn.Module):
    sharing_group = None

    def __init__(self):
        super().__init__()
        self.inner = Tagged(1, 1)


@pytest.mark.parametrize("extra", ["", DEX, '[objective]\nname = "mae"\n', '[objective]\nname = "dino"\n' + DEX])
def test_every_parameter_of_a_model_has_the_group_of_its_part(make_run, extra):
    model = build_model(make_run(extra))
    groups = model.parameter_groups()
    assert groups.keys() == model.state_dict().keys()
    for name, group in groups.items():
        match name.split("."):
            case ["streams", stream, *_] | ["heads", "streams", stream, *_]:
                assert group == f"stream:{stream}"
            case ["backbone", "blocks", _, "mlp", ("director" | "experts" | "router") as part, *_]:
                assert group == part
            case [("backbone" | "heads") as part, *_]:
                assert group == part.removesuffix("s")
            case _:
                pytest.fail(name)


def test_the_innermost_tag_counts():
    model = nn.ModuleDict({"streams": PerStream({"eye-oct": nn.Sequential(nn.Linear(1, 1), Tagged(1, 1))})})
    assert parameter_groups(model) == {
        "streams.eye-oct.0.weight": "stream:eye-oct",
        "streams.eye-oct.0.bias": "stream:eye-oct",
        "streams.eye-oct.1.weight": "head",
        "streams.eye-oct.1.bias": "head",
    }


def test_a_tag_of_none_closes_a_module_to_parameters_of_its_own():
    closed = nn.ModuleDict({"tagged": Tagged(1, 1), "closed": Closed()})
    assert set(parameter_groups(closed).values()) == {"head"}
    closed["closed"].register_parameter("gate", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ProtocolError, match=r"parameter 'closed\.gate' belongs to no group"):
        parameter_groups(closed)


@pytest.mark.parametrize("add", ["register_parameter", "register_buffer", "add_module"])
def test_what_a_layer_of_experts_may_hold_besides_has_no_group(make_run, add):
    model = build_model(make_run(DEX))
    layer = model.director_experts()["backbone.blocks.0.mlp"]
    getattr(layer, add)("gates", nn.Linear(1, 1) if add == "add_module" else nn.Parameter(torch.zeros(1)))
    with pytest.raises(ProtocolError, match=r"parameter 'backbone\.blocks\.0\.mlp\.gates.*' belongs to no group"):
        model.parameter_groups()


def test_what_stands_outside_of_all_tags_has_no_group(make_run):
    model = build_model(make_run())
    model.register_parameter("scale", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ProtocolError, match="parameter 'scale' belongs to no group"):
        model.parameter_groups()


def test_a_layer_alone_names_its_three_groups():
    layer = DirectorExperts(4, 8, Router(4, num_experts=3, num_active=1, temperature=1.0))
    assert set(parameter_groups(layer).values()) == {"director", "experts", "router"}


@pytest.mark.parametrize("extra", ["", DEX])
def test_a_described_model_has_the_names_shapes_and_groups_of_the_built_one(make_run, extra):
    run = make_run(extra)
    built, described = build_model(run), describe_model(run)
    assert all(value.is_meta for value in described.state_dict().values())
    shapes = [[(name, value.shape) for name, value in model.state_dict().items()] for model in (built, described)]
    assert shapes[0] == shapes[1]
    assert built.parameter_groups() == described.parameter_groups()
    assert set(parameter_groups(built.backbone).values()) == built.backbone.sharing_groups


def test_describing_a_model_draws_no_random_number(make_run):
    before = torch.get_rng_state()
    describe_model(make_run(DEX))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_backbone_is_refused(make_run):
    with pytest.raises(
        ConfigError, match=r"model\.backbone: found 'director-expert', expected one of dense, director-exp"
    ):
        make_run('[model]\nbackbone = "director-expert"\n')
    assert BACKBONES.names[:2] == ("dense", "director-experts")


def test_a_stream_with_a_suffix_has_a_module_without_a_dot():
    streams = ("brain-mr.t1", "brain-mr")
    modules = PerStream({module_name(stream): nn.Linear(1, 1, bias=False) for stream in streams})
    assert parameter_groups(nn.ModuleDict({"streams": modules})) == {
        "streams.brain-mr_t1.weight": "stream:brain-mr.t1",
        "streams.brain-mr.weight": "stream:brain-mr",
    }
