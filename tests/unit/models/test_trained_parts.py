"""Parts of a model: the trained names by hand, and low-rank additions."""

import math

import pytest
import torch

from panfm.config import RunConfig, dump_toml, parse_run
from panfm.errors import ConfigError
from panfm.models import build_model, describe_model
from panfm.models.low_rank import fit_lora
from panfm.models.packing import frozen_manifest, trained_manifest
from panfm.models.trained_parts import layers_above
from tests.conftest import SMALL_RUN

PARTS = {
    "all": 'kind = "all"',
    "last-blocks": 'kind = "last-blocks", blocks = 1',
    "attention-projections": 'kind = "attention-projections", blocks = 2',
    "norms": 'kind = "norms"',
    "vectors": 'kind = "vectors"',
    "lora": 'kind = "lora", rank = 2, blocks = 1',
    "lora-frozen-a": 'kind = "lora", rank = 2, blocks = 1, frozen-a = true',
}
DEX = '[model]\nbackbone = "director-experts"\nexperts.count = 2\nexperts.active = 1\n'
BLOCK = 12 * 48**2 + 13 * 48
"""Numbers of a block of `nano`: attention 4 D^2 + 4 D, MLP 8 D^2 + 5 D, two norms 4 D."""


def run_of(part: str, extra: str = "") -> RunConfig:
    return parse_run(f"{SMALL_RUN}parts = {{ {PARTS[part]} }}\n{extra}")


@pytest.mark.parametrize(
    ("part", "names", "numbers"),
    [
        ("last-blocks", 14, BLOCK + 2 * 48),
        ("attention-projections", 4, 2 * (48**2 + 48)),
        ("norms", 10, 10 * 48),
        ("lora", 4, 2 * (48 + 3 * 48) + 2 * (48 + 48)),
        ("lora-frozen-a", 2, 2 * 3 * 48 + 2 * 48),
    ],
)
def test_trained_parameters_of_the_backbone_by_hand(part, names, numbers):
    """And the heads, all of them, and no tokenizer."""
    model = build_model(run_of(part))
    sizes = {name: value.numel() for name, value in model.named_parameters() if name in model.trained}
    backbone = {name: size for name, size in sizes.items() if name.startswith("backbone.")}
    assert (len(backbone), sum(backbone.values())) == (names, numbers)
    assert sizes.keys() - backbone.keys() == {f"heads.{name}" for name, _ in model.heads.named_parameters()}
    assert describe_model(run_of(part)).trained == model.trained


def test_vectors_are_all_parameters_of_one_axis():
    model = build_model(run_of("vectors"))
    assert model.trained == {name for name, value in model.named_parameters() if value.dim() == 1}


@pytest.mark.parametrize("extra", ["", DEX, '[sharing]\nhead = "private"\n'])
@pytest.mark.parametrize("part", PARTS)
def test_what_travels_and_what_is_frozen_make_up_what_is_shared(part, extra):
    run = run_of(part, extra)
    model = build_model(run)
    shared = model.split_state(run.sharing)[0]
    travelling, frozen = model.travelling_state(run.sharing), model.frozen_state(run.sharing)
    assert travelling.keys() | frozen.keys() == shared.keys()
    assert not travelling.keys() & frozen.keys()
    assert bool(frozen) == (part != "all")
    manifest = trained_manifest(model, run.sharing)
    assert sum(map(manifest.size, manifest.groups)) == sum(math.prod(value.shape) for value in travelling.values())
    streams = {f"stream:{name}" for name in run.streams}
    assert {"backbone", *streams} <= manifest.groups.keys()
    assert ("backbone" in frozen_manifest(model, run.sharing).groups) == (part != "all")


def test_the_experts_of_the_last_block_are_trained_with_it_and_others_rest():
    model = build_model(run_of("last-blocks", DEX))
    layers = {name.split(".")[2] for name in model.trained if ".experts." in name or ".director." in name}
    assert layers == {"1"}


def test_a_kind_that_needs_no_number_may_stand_alone():
    short = parse_run(f'{SMALL_RUN}parts = "norms"\n')
    assert short == run_of("norms")
    assert parse_run(dump_toml(short)) == short
    with pytest.raises(ConfigError, match=r"train\.parts\.blocks: missing"):
        parse_run(f'{SMALL_RUN}parts = "last-blocks"\n')


def test_more_blocks_than_there_are_is_told():
    run = parse_run(f'{SMALL_RUN}parts = {{ kind = "last-blocks", blocks = 3 }}\n')
    with pytest.raises(ConfigError, match=r"^train\.parts\.blocks: 3, the model has 2$"):
        build_model(run)


@pytest.mark.parametrize(
    "parts",
    ['kind = "last-blocks"', 'kind = "norms", blocks = 2', 'kind = "heads"', 'kind = "lora", blocks = 0', "rank = 2"],
)
def test_strict(parts):
    with pytest.raises(ConfigError, match=r"train\.parts"):
        parse_run(f"{SMALL_RUN}parts = {{ {parts} }}\n")


def test_a_private_run_freezes_a():
    privacy = "[patient-dp]\nepsilon = 8.0\ndelta = 1e-3\npublic-subjects = 50\nnoise-multiplier = 1.0\n"
    privacy += "sample-rate = 0.1\n"
    with pytest.raises(ConfigError, match=r"train\.parts\.frozen-a: both factors would get noise in a private run"):
        run_of("lora", privacy)
    run_of("lora-frozen-a", privacy)
    with pytest.raises(ConfigError, match=r"patient-dp: trained: .* set train\.parts"):
        run_of("all", f'{privacy}trained = "vectors"\n')


def test_low_rank_additions_start_at_nothing_and_can_be_added_to_the_weights(make_store):
    plain, lora = build_model(run_of("all")), build_model(run_of("lora"))
    store = make_store(run_of("all"), 4)
    batch = store.batch(range(4))
    assert torch.equal(plain.embed(batch), lora.embed(batch))
    layer = lora.get_submodule("backbone.blocks.1.attention.qkv")
    assert layer.lora_a.abs().min() > 0
    torch.nn.init.normal_(layer.lora_b, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(plain.embed(batch), lora.embed(batch))
    plain.load_state_dict(fit_lora(lora.state_dict(), plain.state_dict()))
    torch.testing.assert_close(plain.embed(batch), lora.embed(batch))
    assert fit_lora(lora.state_dict(), lora.state_dict()).keys() == lora.state_dict().keys()
    for other in (torch.zeros(144, 3), torch.zeros(())):
        torn = lora.state_dict() | {"backbone.blocks.1.attention.qkv.lora_b": other}
        assert "backbone.blocks.1.attention.qkv.lora_a" in fit_lora(torn, plain.state_dict())


def test_layers_are_counted_from_the_heads_down():
    above = layers_above(build_model(run_of("all")))
    by_hand = {"heads.predictor.out.weight": 0, "backbone.norm.weight": 0, "backbone.blocks.1.norm1.bias": 1}
    by_hand |= {"backbone.blocks.0.mlp.0.weight": 2, "backbone.cls": 3, "streams.brain-mr.project.weight": 3}
    assert {name: above[name] for name in by_hand} == by_hand
