import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from panfm.config.sharing import SharingConfig
from panfm.errors import ProtocolError
from panfm.sharing.groups import GroupManifest, group_of, is_shared, split_state, stream_of


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("streams.brain-mr.project.weight", "stream:brain-mr"),
        ("streams.chest-xray.embedding", "stream:chest-xray"),
        ("heads.streams.brain-mr.hidden_query", "stream:brain-mr"),
        ("backbone.cls", "backbone"),
        ("backbone.blocks.0.attention.weight", "backbone"),
        ("heads.predictor.query.weight", "head"),
    ],
)
def test_every_parameter_has_one_group(name, group):
    assert group_of(name) == group


@pytest.mark.parametrize(
    "name", ["teacher.backbone.cls", "optimiser.step", "streams.brain-mr", "heads.streams.brain-mr", "backbone", ""]
)
def test_what_no_rule_covers_is_an_error(name):
    with pytest.raises(ProtocolError, match="belongs to no group"):
        group_of(name)


def test_every_parameter_of_a_real_model_has_a_group(small_run):
    from panfm.models import build_model

    shapes = {name: tuple(tensor.shape) for name, tensor in build_model(small_run).state_dict().items()}
    groups = GroupManifest.of(shapes).groups
    assert sorted(groups) == ["backbone", "head", "stream:brain-mr", "stream:heart-mr"]
    assert sorted(name for layout in groups.values() for name, _ in layout) == sorted(shapes)


def test_stream_of():
    assert stream_of("stream:brain-mr") == "brain-mr"
    assert stream_of("backbone") is None


def tensors() -> dict[str, np.ndarray]:
    return {
        "backbone.b": np.arange(2, dtype=np.float32),
        "backbone.a": np.arange(6, dtype=np.float32).reshape(2, 3) + 10,
        "heads.scale": np.array(7, dtype=np.float32),
    }


def manifest() -> GroupManifest:
    return GroupManifest.of({name: tensor.shape for name, tensor in tensors().items()})


def test_pack_by_hand():
    assert manifest().pack("backbone", tensors()).tolist() == [10, 11, 12, 13, 14, 15, 0, 1]
    assert manifest().pack("head", tensors()).tolist() == [7]


@given(st.dictionaries(st.sampled_from("abcdef"), st.lists(st.integers(0, 4), max_size=3), min_size=1))
def test_round_trip(shapes):
    values = {
        f"backbone.{name}": np.random.default_rng(index).normal(size=shape).astype(np.float32)
        for index, (name, shape) in enumerate(shapes.items())
    }
    layout = GroupManifest.of({name: value.shape for name, value in values.items()})
    back = layout.unpack_all(layout.pack_all(values))
    assert back.keys() == values.keys()
    for name, value in values.items():
        assert back[name].shape == value.shape
        assert back[name].tobytes() == value.tobytes()


@pytest.mark.parametrize(
    "wrong",
    [
        {"backbone.a": np.zeros((3, 2), np.float32)},
        {"backbone.a": np.zeros((2, 3), np.float64)},
        {"backbone.a": None},
    ],
)
def test_pack_refuses(wrong):
    with pytest.raises(ProtocolError, match=r"backbone: backbone\.a is"):
        manifest().pack("backbone", tensors() | wrong)


def test_unpack_refuses_a_wrong_size_and_an_unknown_group():
    with pytest.raises(ProtocolError, match=r"expected float32 \[8\]"):
        manifest().unpack("backbone", np.zeros(9, np.float32))
    with pytest.raises(ProtocolError, match="got float64"):
        manifest().unpack("backbone", np.zeros(8))
    with pytest.raises(ProtocolError, match="missing group 'head'"):
        manifest().unpack_all({"backbone": np.zeros(8, np.float32)})
    with pytest.raises(ProtocolError, match="unknown group 'experts'"):
        manifest().unpack_all({"experts": np.zeros(9, np.float32)})


def test_hash_tells_layouts_apart():
    other = GroupManifest.of({"backbone.a": (3, 2), "backbone.b": (2,), "heads.scale": ()})
    assert manifest().hashes() == manifest().hashes()
    assert manifest().hashes()["backbone"] != other.hashes()["backbone"]
    assert manifest().hashes()["head"] == other.hashes()["head"]


DEX = {
    "backbone.cls": (2,),
    "backbone.blocks.0.mlp.0.weight": (2, 2),
    "backbone.blocks.1.mlp.director.0.weight": (2, 1),
    "backbone.blocks.1.mlp.experts.weight_in": (3, 2, 1),
    "backbone.blocks.1.mlp.experts.bias_in": (3, 2),
    "backbone.blocks.1.mlp.router.weight": (3, 1),
    "backbone.blocks.2.mlp.experts.bias_in": (1, 2),
}


@pytest.mark.parametrize("name", ["backbone.blocks.0.mlp.activation", "backbone.blocks.0.mlp.gates.weight"])
def test_what_a_layer_of_experts_may_hold_besides_has_no_group(name):
    with pytest.raises(ProtocolError, match="belongs to no group"):
        group_of(name)


def test_director_experts_and_router_have_groups():
    groups = GroupManifest.of(DEX).groups
    assert {group: [name for name, _ in layout] for group, layout in groups.items()} == {
        "backbone": ["backbone.blocks.0.mlp.0.weight", "backbone.cls"],
        "director": ["backbone.blocks.1.mlp.director.0.weight"],
        "experts": sorted(name for name in DEX if ".experts." in name),
        "router": ["backbone.blocks.1.mlp.router.weight"],
    }


def test_segments_say_whose_every_number_is():
    manifest = GroupManifest.of(DEX)
    layers = ("backbone.blocks.1.mlp", "backbone.blocks.2.mlp")
    assert manifest.experts("experts") == ((layers[0], 0), (layers[0], 1), (layers[0], 2), (layers[1], 0))
    marked = {
        name: np.concatenate([np.full((1, *shape[1:]), 10 * int(name.split(".")[2]) + row) for row in range(shape[0])])
        for name, shape in DEX.items()
        if ".experts." in name
    }
    flat = manifest.pack("experts", {name: value.astype(np.float32) for name, value in marked.items()})
    whose = [
        manifest.experts("experts")[which] for length, which in manifest.segments("experts") for _ in range(length)
    ]
    assert [f"{layer.split('.')[2]}{row}" for layer, row in whose] == [f"{value:.0f}" for value in flat]


@pytest.mark.parametrize(
    ("words", "private"),
    [
        ({}, {"experts", "router"}),
        ({"head": "private"}, {"experts", "router", "head"}),
        ({"experts": "pooled"}, set()),
        ({"experts": "naive", "head": "private"}, {"head"}),
    ],
)
def test_what_is_private_is_not_shared(words, private):
    sharing = SharingConfig(**words)
    names = dict.fromkeys([*DEX, "heads.project.weight", "heads.streams.brain-mr.query", "streams.brain-mr.a"], 0)
    shared, kept = split_state(sharing, names)
    assert {group_of(name) for name in kept} == private
    assert shared | kept == names
    assert not shared.keys() & kept.keys()
    assert all(is_shared(sharing, group_of(name)) == (name in shared) for name in names)
