"""Dense ViT: CLS attention against the full matrix, centred values against a loop."""

import pytest
import torch
from torch.testing import assert_close

from panfm.config import parse_run
from panfm.config.model import ModelConfig
from panfm.errors import ConfigError
from panfm.models import describe_model
from panfm.models.tokens import pack
from panfm.models.vit import VisionTransformer, rotate
from tests.conftest import SMALL_RUN

STREAM_OF_PATCH = torch.tensor([0, 0, 1, 1, 1, 2])


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return VisionTransformer(12, 2, 3, ModelConfig())


@pytest.fixture
def layout():
    return pack(torch.tensor([[True, True, True], [True, False, True], [False, True, False]]), STREAM_OF_PATCH)


def slow_saliency(backbone, tokens, layout, kind):
    """One subject at a time, full attention matrices, no padding."""
    inputs = [tokens[b][layout.valid[b]] for b in range(len(tokens))]
    registers = [] if backbone.registers is None else [backbone.registers]
    streams = [torch.cat([backbone.cls[None], x, *registers])[None] for x in inputs]
    scores = [torch.zeros(len(x)) for x in inputs]
    for block in backbone.blocks:
        attention, values = [], []
        for x in streams:
            q, k, v = block.attention.qkv(block.norm1(x)).view(x.shape[1], 3, 3, 4).permute(1, 2, 0, 3)
            attention.append((q @ k.transpose(-1, -2) / 2.0).softmax(-1)[:, 0])
            values.append(v[:, 1:])
        for b in range(len(inputs)):
            row = attention[b][:, 1 : 1 + len(inputs[b])]
            row = row / row.sum(-1, keepdim=True)
            if kind == "attention":
                scores[b] = row.sum(0)
                continue
            for token, place in enumerate(layout.patch_index[b][layout.valid[b]]):
                same = [
                    values[other][:, column]
                    for other in range(len(inputs))
                    for column in torch.nonzero(layout.patch_index[other][layout.valid[other]] == place).flatten()
                ]
                centred = values[b][:, token] - torch.stack(same).mean(0)
                scores[b][token] += (row[:, token] * centred.norm(dim=-1)).sum()
        streams = [block(x, None)[0] for x in streams]
    return [score / score.sum() for score in scores]


@pytest.mark.parametrize("kind", ["attention", "value"])
@pytest.mark.parametrize("complete", [False, True])
@torch.no_grad()
def test_saliency_equals_full_attention_matrices(backbone, layout, kind, complete):
    if complete:
        layout = pack(torch.ones(3, 3, dtype=torch.bool), STREAM_OF_PATCH)
    tokens = torch.randn(3, layout.patch_index.shape[1], 12, generator=torch.Generator().manual_seed(1))
    found = backbone(tokens, layout, saliency=kind).saliency
    for b, expected in enumerate(slow_saliency(backbone, tokens, layout, kind)):
        assert_close(found[b][layout.valid[b]], expected, atol=1e-5, rtol=1e-4)
        assert (found[b][~layout.valid[b]] == 0).all()


@torch.no_grad()
def test_padding_is_never_attended_to(backbone, layout):
    tokens = torch.randn(3, layout.patch_index.shape[1], 12, generator=torch.Generator().manual_seed(1))
    spoiled = torch.where(layout.valid[..., None], tokens, torch.full_like(tokens, 1e3))
    assert_close(backbone(tokens, layout).cls, backbone(spoiled, layout).cls)


@torch.no_grad()
def test_a_subject_without_any_token_is_its_cls_alone(backbone):
    empty = pack(torch.tensor([[False, False, False]]), STREAM_OF_PATCH)
    encoded = backbone(torch.zeros(1, 0, 12), empty, saliency="value")
    assert torch.isfinite(encoded.cls).all()
    assert encoded.saliency.shape == (1, 0)


@torch.no_grad()
def test_saliency_of_one_subject_is_its_attention(backbone):
    """Alone in its batch, no value can be centred: every norm counts alike."""
    alone = pack(torch.tensor([[True, True, True]]), STREAM_OF_PATCH)
    tokens = torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(1))
    found = backbone(tokens, alone, saliency="value").saliency
    rows = []
    x = torch.cat([backbone.cls[None, None], tokens], dim=1)
    for block in backbone.blocks:
        q, k, _ = block.attention.qkv(block.norm1(x)).view(1, 7, 3, 3, 4).permute(2, 0, 3, 1, 4)
        rows.append((q[:, :, :1] @ k[:, :, 1:].transpose(-1, -2) / 2.0).softmax(-1).sum(1)[:, 0])
        x = block(x, None)[0]
    assert_close(found, sum(rows) / sum(rows).sum())


@torch.no_grad()
def test_a_place_held_by_one_subject_gets_the_typical_norm(backbone):
    layout = pack(torch.tensor([[True, True, False], [True, False, True], [True, True, False]]), STREAM_OF_PATCH)
    tokens = torch.randn(3, layout.patch_index.shape[1], 12, generator=torch.Generator().manual_seed(1))
    found = backbone(tokens, layout, saliency="value").saliency
    assert_close(found.sum(1), torch.ones(3))
    assert (found[layout.valid] > 0.01).all()


def test_last_layers_are_the_last_blocks_and_the_norm(backbone):
    first, second = backbone.blocks
    assert backbone.last_layers(1) == [second, backbone.norm]
    assert backbone.last_layers(2) == [first, second, backbone.norm]


@pytest.mark.parametrize("kind", ["attention", "value"])
@torch.no_grad()
def test_registers_are_attended_to_and_take_no_share_of_saliency(layout, kind):
    torch.manual_seed(0)
    backbone = VisionTransformer(12, 2, 3, ModelConfig(registers=2))
    backbone.registers.normal_()
    tokens = torch.randn(3, layout.patch_index.shape[1], 12, generator=torch.Generator().manual_seed(1))
    encoded = backbone(tokens, layout, saliency=kind, keep_blocks=True)
    assert encoded.tokens.shape == encoded.blocks[0].shape == tokens.shape
    for b, expected in enumerate(slow_saliency(backbone, tokens, layout, kind)):
        assert_close(encoded.saliency[b][layout.valid[b]], expected, atol=1e-5, rtol=1e-4)
    before = encoded.cls
    backbone.registers.neg_()
    assert not torch.allclose(backbone(tokens, layout).cls, before)


@torch.no_grad()
def test_rotary_attention_depends_on_places_by_their_differences_alone():
    """Turning all patches by the same angles changes nothing but how CLS and registers, which stay, look at them."""
    x = torch.randn(1, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.rand(5, 4, generator=torch.Generator().manual_seed(1)).tile(2)

    def products(moved):
        turned = rotate(x, ((angles + moved).cos(), (angles + moved).sin()))
        return turned @ turned.transpose(-1, -2)

    assert_close(products(torch.zeros(8)), products(torch.tensor([0.3, -1.0, 2.0, 0.1]).tile(2)))
    assert not torch.allclose(products(torch.zeros(8)), x @ x.transpose(-1, -2))


def test_rotary_positions_are_for_images():
    run = parse_run(f'{SMALL_RUN}[model]\npositions = "rotary"\n')
    with pytest.raises(ConfigError, match=r'^model\.positions: "rotary" is for images, brain-mr has volumes$'):
        describe_model(run)
