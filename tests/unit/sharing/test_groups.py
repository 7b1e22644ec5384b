import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from panfm.errors import ProtocolError
from panfm.sharing.groups import GroupManifest, group_of, stream_of


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
