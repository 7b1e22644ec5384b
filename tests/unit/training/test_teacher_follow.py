"""Two ways for a teacher's parameters to follow the student's: in turn, and on CUDA all at once."""

import pytest
import torch

from panfm.training.training_state import follow_at_once, follow_in_turn


def parameters(seed):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random) for shape in ((3,), (4, 5), (1,), (2, 3, 4))]


@pytest.mark.parametrize("follow", [follow_in_turn, follow_at_once])
def test_a_quarter_of_the_way(follow):
    followers = [torch.tensor([0.0, 4.0]), torch.tensor([[8.0]])]
    follow(followers, [torch.tensor([4.0, 0.0]), torch.tensor([[8.0]])], torch.tensor(0.25))
    assert followers[0].tolist() == [1.0, 3.0]
    assert followers[1].item() == 8.0


def test_both_ways_are_the_same_up_to_rounding():
    in_turn, at_once = parameters(0), parameters(0)
    for _ in range(100):
        follow_in_turn(in_turn, parameters(1), torch.tensor(0.004))
        follow_at_once(at_once, parameters(1), torch.tensor(0.004))
    for one, other in zip(in_turn, at_once, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("follow", [follow_in_turn, follow_at_once])
def test_a_step_that_does_not_count_changes_no_bit(follow):
    followers = parameters(0)
    follow(followers, parameters(1), torch.tensor(0.0))
    assert all(torch.equal(now, before) for now, before in zip(followers, parameters(0), strict=True))
