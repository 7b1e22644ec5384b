"""Shares per stream and the relative profile, by hand."""

import torch
from torch.testing import assert_close

from panfm.models.tokens import pack
from panfm.training.saliency import relative_profile, stream_shares, streams_present

STREAM_OF_PATCH = torch.tensor([0, 0, 1])


def test_stream_shares_by_hand():
    layout = pack(torch.tensor([[True, True], [False, True]]), STREAM_OF_PATCH)
    tokens = torch.tensor([[0.2, 0.3, 0.5], [1.0, 9.0, 9.0]])
    assert_close(stream_shares(tokens, layout, STREAM_OF_PATCH, 2), torch.tensor([[0.5, 0.5], [0.0, 1.0]]))


def test_relative_profile_by_hand():
    shares = torch.tensor([[0.8, 0.2, 0.0], [1.0, 0.0, 0.0]])
    mean, count = relative_profile(shares, shares > 0)
    assert_close(mean, torch.tensor([(1.6 + 1.0) / 2, 0.4, 1.0]))
    assert count.tolist() == [2, 1, 0]


def test_an_equal_split_is_one_whatever_the_streams():
    shares = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0.5, 0.0, 0.5]])
    assert_close(relative_profile(shares, shares > 0)[0], torch.ones(3))


def test_a_stream_without_saliency_is_still_present():
    layout = pack(torch.tensor([[True, True], [False, True]]), STREAM_OF_PATCH)
    present = streams_present(layout, STREAM_OF_PATCH, 2)
    assert present.tolist() == [[True, True], [False, True]]
    mean, count = relative_profile(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), present)
    assert_close(mean, torch.tensor([0.0, 1.5]))
    assert count.tolist() == [1, 2]
