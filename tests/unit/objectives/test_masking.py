"""Masking: exact budgets for every policy, probabilities against a direct simulation, direction of guidance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from panfm.config.run import MaskingConfig
from panfm.models.tokens import pack
from panfm.objectives.masking import draw_hidden, stream_scores

STREAM_OF_PLACE = torch.arange(3).repeat_interleave(torch.tensor([4, 2, 6]))
ORGANS = ("heart", "brain", "adipose")
POLICIES = ("random", "organ", "sgm", "inverse", "static")


def draw(config, relative, present, *, position=0.5, seed=0):
    layout = pack(torch.tensor(present), STREAM_OF_PLACE)
    scores = stream_scores(config, relative, ORGANS, position)
    return layout, draw_hidden(config, scores, layout, STREAM_OF_PLACE, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("policy", POLICIES)
@given(
    present=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=8),
    ratio=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_the_budget_is_exact_under_every_policy(policy, present, ratio, seed):
    layout, hidden = draw(MaskingConfig(policy=policy, ratio=ratio), torch.rand(1, 3) * 3, present, seed=seed)
    assert not (hidden & ~layout.valid).any()
    for count, row in zip(layout.valid.sum(1).tolist(), hidden.sum(1).tolist(), strict=True):
        wanted = torch.tensor(count * ratio).round().item()
        assert row == max(min(max(wanted, 1), count - 1), 0)


def shares(policy, relative, *, position=0.5, **config):
    """Share of each stream's tokens hidden, over many draws."""
    config = MaskingConfig(policy=policy, anneal=0.0, warmup=0.0, **config)
    layout, hidden = draw(config, torch.tensor([relative]), [[True] * 3] * 4000, position=position)
    stream = STREAM_OF_PLACE[layout.place]
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
    stream = STREAM_OF_PLACE[layout.place]
    partial = torch.stack(
        [hidden.logical_and(stream == index).sum(1) % (stream[0] == index).sum() != 0 for index in range(3)]
    )
    assert partial.sum(0).max() == 1


def test_gumbel_top_k_equals_drawing_without_replacement():
    """P(first two hidden) by hand: two tokens drawn one after another in proportion to exp(score)."""
    config = MaskingConfig(policy="sgm", ratio=0.34, strength=1.0, anneal=0.0, warmup=0.0)
    stream_of_place = torch.arange(3)
    layout = pack(torch.ones(60_000, 3, dtype=torch.bool), stream_of_place)
    scores = torch.tensor([[3.0, 2.0, 1.0]]).log()
    hidden = draw_hidden(config, scores, layout, stream_of_place, torch.Generator().manual_seed(0))
    found = hidden.float().mean(0)
    assert (found - torch.tensor([3, 2, 1]) / 6).abs().max() < 3 * (0.25 / 60_000) ** 0.5 * 1.5


def test_strength_rises_and_is_annealed():
    config = MaskingConfig(policy="sgm", warmup=0.1, anneal=0.5)
    relative = torch.tensor([[2.0, 1.0, 0.5]])
    sizes = [stream_scores(config, relative, ORGANS, position).abs().sum() for position in (0.0, 0.1, 0.3, 0.5, 1.0)]
    assert sizes[0] == 0
    assert sizes[1] > sizes[2] > 0
    assert sizes[3] == sizes[4] == 0


def test_masks_follow_the_generator():
    config = MaskingConfig(policy="sgm")
    relative, present = torch.ones(1, 3), [[True] * 3] * 5
    _, first = draw(config, relative, present)
    _, again = draw(config, relative, present)
    _, other = draw(config, relative, present, seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
