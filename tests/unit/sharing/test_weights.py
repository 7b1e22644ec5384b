import pytest

from panfm.sharing.weights import GroupWeights, Trained
from tests.conftest import manifest_of

LAYERS = ("backbone.blocks.0.mlp", "backbone.blocks.1.mlp")
MANIFEST = manifest_of(
    {
        "backbone": {"backbone.cls": (2,)},
        "head": {"heads.a": (1,)},
        "stream:brain-mr": {"streams.brain-mr.a": (2,)},
        "stream:heart-mr": {"streams.heart-mr.a": (2,)},
        "director": {f"{layer}.director.0.weight": (2, 3) for layer in LAYERS},
        "router": {f"{layer}.router.weight": (size, 3) for layer, size in zip(LAYERS, (2, 3), strict=True)},
        "experts": {f"{layer}.experts.weight_in": (size, 2, 3) for layer, size in zip(LAYERS, (2, 3), strict=True)}
        | {f"{layer}.experts.bias_in": (size, 2) for layer, size in zip(LAYERS, (2, 3), strict=True)},
    }
)
TRAINED = Trained(10, {"brain-mr": 4}, 3, {LAYERS[0]: [7.5, 4.5], LAYERS[1]: [12.0, 0.0, 0.0]})


@pytest.fixture
def sharing(small_run):
    """Weights of the small run under other rules."""

    def weights(**changes):
        return GroupWeights(small_run.sharing.model_copy(update=changes), small_run.train, None, MANIFEST)

    return weights


def test_grouped_and_plain(sharing):
    words = {"subjects": 10, "subjects_per_stream": {"brain-mr": 4}}

    def weigh(sharing, group, num_steps=3):
        return sharing.weights(group, Trained(**words, num_steps=num_steps))

    grouped = sharing()
    assert weigh(grouped, "backbone") == weigh(grouped, "head") == (30,)
    assert weigh(grouped, "stream:brain-mr") == (4,)
    assert weigh(grouped, "stream:heart-mr") == (0,)
    assert weigh(grouped, "backbone", 0) == weigh(grouped, "stream:brain-mr", 0) == (0,)
    plain = sharing(rule="plain", experts="pooled")
    assert {weigh(plain, group) for group in MANIFEST.groups} == {(30,)}


def test_by_gate_mass(sharing):
    pooled, naive = sharing(experts="pooled"), sharing(experts="naive")
    assert pooled.weights("director", TRAINED) == (24.0,)
    for group in ("experts", "router"):
        assert pooled.weights(group, TRAINED) == (7.5, 4.5, 12.0, 0.0, 0.0)
        assert naive.weights(group, TRAINED) == (30.0,)
        assert naive.segments(group) == ((MANIFEST.size(group), 0),)
    assert pooled.segments("router") == ((3, 0), (3, 1), (3, 2), (3, 3), (3, 4))
    assert pooled.segments("experts") == (
        *((2, 0), (2, 1), (6, 0), (6, 1)),
        *((2, 2), (2, 3), (2, 4), (6, 2), (6, 3), (6, 4)),
    )


@pytest.mark.parametrize(("rule", "experts"), [("grouped", "pooled"), ("grouped", "naive"), ("plain", "pooled")])
def test_honest_weights_keep_to_their_limits(small_run, sharing, rule, experts):
    """All images of all steps to one expert is the most there can be; more is too much."""
    sharing, train = sharing(rule=rule, experts=experts), small_run.train
    words = {"subjects": 10, "subjects_per_stream": {"brain-mr": 4}}
    images, steps = float(min(10, train.batch_size) * train.local_steps), train.local_steps
    one_expert = {LAYERS[0]: [0.0, images], LAYERS[1]: [images, 0.0, 0.0]}
    for group in MANIFEST.groups:
        most = sharing.weights(group, Trained(**words, num_steps=steps, gate_mass=one_expert))
        limits = sharing.limits(group, **words)
        assert all(weight <= limit <= 1.001 * max(most) for weight, limit in zip(most, limits, strict=True))
