"""Masking: exact budgets for every policy, probabilities against a direct simulation, direction of guidance."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from panfm.config.masking import MaskingConfig
from panfm.models.tokens import pack
from panfm.training.saliency import normalised_entropy
from panfm.training.token_mask import build_policy, draw_mask

STREAM_OF_PATCH = torch.arange(3).repeat_interleave(torch.tensor([4, 2, 6]))
ORGANS = ("heart", "brain", "adipose")
POLICIES = ("random", "organ", "sgm", "inverse", "static")


def hidden_places(mask):
    """bool [B, N]."""
    columns = mask.hidden_column.masked_fill(~mask.hidden.valid, mask.layout.patch_index.shape[1])
    hidden = torch.zeros(len(columns), mask.layout.patch_index.shape[1] + 1, dtype=torch.bool)
    return hidden.scatter(1, columns, mask.hidden.valid)[:, :-1]


def draw(config, relative, present, *, step=100, seed=0):
    layout = pack(torch.tensor(present), STREAM_OF_PATCH)
    generator = torch.Generator().manual_seed(seed)
    mask = draw_mask(build_policy(config, ORGANS), relative, layout, STREAM_OF_PATCH, step=step, generator=generator)
    return layout, hidden_places(mask)


def stream_scores(config, relative, step):
    return build_policy(config, ORGANS).scores(relative, len(relative), step, torch.Generator())


@pytest.mark.parametrize("policy", POLICIES)
@given(
    present=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=8),
    ratio=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_the_budget_is_exact_under_every_policy(policy, present, ratio, seed):
    relative = 3 * torch.rand(1, 3, generator=torch.Generator().manual_seed(seed))
    layout, hidden = draw(MaskingConfig(policy=policy, ratio=ratio), relative, present, seed=seed)
    assert not (hidden & ~layout.valid).any()
    for count, row in zip(layout.valid.sum(1).tolist(), hidden.sum(1).tolist(), strict=True):
        wanted = torch.tensor(count * ratio).round().item()
        assert row == max(min(max(wanted, 1), count - 1), 0)


def shares(policy, relative, **config):
    """Share of each stream's tokens hidden, over many draws."""
    config = MaskingConfig(policy=policy, **{"limit": 20.0} | config)
    layout, hidden = draw(config, torch.tensor([relative]), [[True] * 3] * 4000)
    stream = STREAM_OF_PATCH[layout.patch_index]
    return torch.stack([hidden[stream == index].float().mean() for index in range(3)])


def test_random_hides_all_streams_alike():
    assert (shares("random", [2.0, 0.5, 0.5]) - 7 / 12).abs().max() < 0.02


def test_sgm_hides_what_the_model_leans_on_and_inverse_the_opposite():
    sgm, inverse = shares("sgm", [2.0, 0.5, 0.5]), shares("inverse", [2.0, 0.5, 0.5])
    assert sgm[0] > 0.9 > 0.6 > sgm[1]
    assert inverse[0] < 0.2 < 0.6 < inverse[1]


def test_static_hides_the_named_organs():
    static = shares("static", [1.0, 1.0, 1.0])
    assert min(static[0], static[2]) > static[1] + 0.3


def test_organ_hides_whole_streams():
    layout, hidden = draw(MaskingConfig(policy="organ"), torch.ones(1, 3), [[True] * 3] * 200)
    stream = STREAM_OF_PATCH[layout.patch_index]
    partial = torch.stack(
        [hidden.logical_and(stream == index).sum(1) % (stream[0] == index).sum() != 0 for index in range(3)]
    )
    assert partial.sum(0).max() == 1


def test_gumbel_top_k_equals_drawing_without_replacement():
    """P(first two hidden) by hand: two tokens drawn one after another in proportion to exp(score)."""
    config = MaskingConfig(policy="sgm", ratio=0.34, strength=1.0)
    stream_of_patch = torch.arange(3)
    layout = pack(torch.ones(60_000, 3, dtype=torch.bool), stream_of_patch)
    policy, relative = build_policy(config, ORGANS), torch.tensor([[3.0, 2.0, 1.0]])
    mask = draw_mask(policy, relative, layout, stream_of_patch, step=100, generator=torch.Generator().manual_seed(0))
    found = hidden_places(mask).float().mean(0)
    assert (found - torch.tensor([3, 2, 1]) / 6).abs().max() < 3 * (0.25 / 60_000) ** 0.5 * 1.5


def test_a_stream_is_hidden_no_more_than_the_limit_says():
    scores = stream_scores(MaskingConfig(limit=0.5), torch.tensor([[2.9, 0.1, 0.0]]), 100)
    assert scores.tolist() == [[0.5, -0.5, -0.5]]
    clipped, free = shares("sgm", [2.6, 0.2, 0.2], limit=0.5), shares("sgm", [2.6, 0.2, 0.2])
    assert clipped[0] < 0.85 < 0.98 < free[0]


def test_a_stream_that_nobody_leans_on_is_still_hidden_now_and_then():
    scores = stream_scores(MaskingConfig(limit=20.0, strength=2.0), torch.tensor([[2.9, 0.06, 0.01]]), 100)
    assert scores.tolist() == [pytest.approx([2 * math.log(2.9), 2 * math.log(0.06), 2 * math.log(0.05)])]


@pytest.mark.parametrize(
    ("step", "balanced", "lopsided"),
    [
        (0, 0.05, 0.05),
        (9, 0.5, 0.5),
        (19, 1.0, 1.0),
        (500, 1.0, 1.0),
        (750, 0.5, 1.0),
        (1000, 0.0, 1.0),
        (9999, 0.0, 1.0),
    ],
)
def test_guidance_rises_and_then_stays_only_where_dominance_lasts(step, balanced, lopsided):
    config = MaskingConfig(warmup_steps=20, settle_steps=500)
    relative = torch.tensor([[1.0, 1.0, 1.0], [2.9, 0.05, 0.05]])
    guidance = build_policy(config, ORGANS).guidance(relative, step)
    assert guidance.flatten().tolist() == pytest.approx([balanced, lopsided], abs=1e-6)


def test_guidance_that_lasts_falls_linearly_with_balance():
    relative = torch.tensor([[1.6, 0.4, 0.0]])
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2)) / math.log(2)
    found = build_policy(MaskingConfig(balance=entropy + 0.03), ORGANS).guidance(relative, 5000)
    assert found.item() == pytest.approx(0.3, abs=1e-5)


@pytest.mark.parametrize(
    ("relative", "entropy"), [([1.0, 1.0, 1.0], 1.0), ([3.0, 0.0, 0.0], 1.0), ([2.0, 0.0, 2.0], 1.0)]
)
def test_entropy_counts_only_the_streams_present(relative, entropy):
    assert normalised_entropy(torch.tensor([relative])).item() == pytest.approx(entropy)


def test_masks_follow_the_generator():
    config = MaskingConfig(policy="sgm")
    relative, present = torch.ones(1, 3), [[True] * 3] * 5
    _, first = draw(config, relative, present)
    _, again = draw(config, relative, present)
    _, other = draw(config, relative, present, seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
