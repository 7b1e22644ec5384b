import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from panfm.config.sharing import SharingConfig
from panfm.errors import ProtocolError
from panfm.sharing.groups import GroupManifest, is_shared, split_state, stream_of
from tests.conftest import manifest_of


@pytest.mark.parametrize(
    "name", ["teacher.backbone.cls", "optimiser.step", "streams.brain-mr", "heads.streams.brain-mr", "backbone", ""]
)
def test_a_parameter_that_the_model_does_not_have_has_no_group(name):
    groups = {"backbone.cls": "backbone", "streams.brain-mr.embedding": "stream:brain-mr"}
    with pytest.raises(ProtocolError, match="belongs to no group"):
        split_state(SharingConfig(), groups, {name: 0})
    with pytest.raises(ProtocolError, match="belongs to no group"):
        GroupManifest.of(groups, {name: np.zeros(1)})


@pytest.mark.parametrize("group", ["", "backbones", "stream:", "teacher"])
def test_an_unknown_group_is_not_shared(group):
    with pytest.raises(ProtocolError, match="unknown group"):
        is_shared(SharingConfig(), group)


def test_every_parameter_of_a_real_model_has_a_group(small_run):
    from panfm.models import build_model

    model = build_model(small_run)
    groups = GroupManifest.of(model.parameter_groups(), model.state_dict()).groups
    assert sorted(groups) == ["backbone", "head", "stream:brain-mr", "stream:heart-mr"]
    assert sorted(name for layout in groups.values() for name, _ in layout) == sorted(model.state_dict())


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
    return GroupManifest.of(
        {"backbone.a": "backbone", "backbone.b": "backbone", "heads.scale": "head", "heads.other": "head"}, tensors()
    )


def test_pack_by_hand():
    assert manifest().pack("backbone", tensors()).tolist() == [10, 11, 12, 13, 14, 15, 0, 1]
    assert manifest().pack("head", tensors()).tolist() == [7]
    before = np.arange(8, dtype=np.float32)
    assert manifest().pack("backbone", tensors(), minus=before).tolist() == [10, 10, 10, 10, 10, 10, -6, -6]


@given(st.dictionaries(st.sampled_from("abcdef"), st.lists(st.integers(0, 4), max_size=3), min_size=1))
def test_round_trip(shapes):
    values = {
        f"backbone.{name}": np.random.default_rng(index).normal(size=shape).astype(np.float32)
        for index, (name, shape) in enumerate(shapes.items())
    }
    layout = GroupManifest.of(dict.fromkeys(values, "backbone"), values)
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
    other = manifest_of({"backbone": {"backbone.a": (3, 2), "backbone.b": (2,)}, "head": {"heads.scale": ()}})
    assert manifest().hashes() == manifest().hashes()
    assert manifest().hashes()["backbone"] != other.hashes()["backbone"]
    assert manifest().hashes()["head"] == other.hashes()["head"]


DEX = {
    "backbone.cls": "backbone",
    "backbone.blocks.0.mlp.0.weight": "backbone",
    "backbone.blocks.1.mlp.director.0.weight": "director",
    "backbone.blocks.1.mlp.experts.weight_in": "experts",
    "backbone.blocks.1.mlp.experts.bias_in": "experts",
    "backbone.blocks.1.mlp.router.weight": "router",
    "backbone.blocks.2.mlp.experts.bias_in": "experts",
}
SHAPES = dict(zip(DEX, [(2,), (2, 2), (2, 1), (3, 2, 1), (3, 2), (3, 1), (1, 2)], strict=True))


def dex_manifest() -> GroupManifest:
    return GroupManifest.of(DEX, {name: np.empty(shape) for name, shape in SHAPES.items()})


def test_director_experts_and_router_have_groups():
    groups = dex_manifest().groups
    assert {group: [name for name, _ in layout] for group, layout in groups.items()} == {
        "backbone": ["backbone.blocks.0.mlp.0.weight", "backbone.cls"],
        "director": ["backbone.blocks.1.mlp.director.0.weight"],
        "experts": sorted(name for name in DEX if ".experts." in name),
        "router": ["backbone.blocks.1.mlp.router.weight"],
    }


def test_segments_say_whose_every_number_is():
    manifest = dex_manifest()
    layers = ("backbone.blocks.1.mlp", "backbone.blocks.2.mlp")
    assert manifest.experts("experts") == ((layers[0], 0), (layers[0], 1), (layers[0], 2), (layers[1], 0))
    marked = {
        name: np.concatenate([np.full((1, *shape[1:]), 10 * int(name.split(".")[2]) + row) for row in range(shape[0])])
        for name, shape in SHAPES.items()
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
    streams = {"heads.streams.brain-mr.query": "stream:brain-mr", "streams.brain-mr.a": "stream:brain-mr"}
    groups = {**DEX, "heads.project.weight": "head", **streams}
    shared, kept = split_state(sharing, groups, groups)
    assert set(kept.values()) == private
    assert shared | kept == groups
    assert not shared.keys() & kept.keys()
    assert all(is_shared(sharing, group) == (name in shared) for name, group in groups.items())
