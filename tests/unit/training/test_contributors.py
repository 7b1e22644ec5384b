"""Who stands behind a round's update, by hand."""

from types import SimpleNamespace

import numpy as np
import torch

from panfm.models.tokens import Layout
from panfm.training.token_mask import Contributors, TokenMask, has_loss

CPU, YES = torch.device("cpu"), torch.ones((), dtype=torch.bool)
PLACES = torch.tensor([0, 0, 1, 1])
"""Two streams of two patches."""


def mask_of(hidden: list[list[bool]], held: list[list[bool]]) -> TokenMask:
    layout = Layout(torch.arange(4).expand(len(held), 4), torch.ones(len(held), 4, dtype=torch.bool))
    layout = layout.select(torch.tensor(held))[0]
    return TokenMask.of(layout, torch.tensor(hidden)[:, : layout.patch_index.shape[1]])


def routed(*experts: list[list[int]]) -> SimpleNamespace:
    return SimpleNamespace(routed=[SimpleNamespace(chosen=torch.tensor(layer)) for layer in experts])


def test_a_subject_counts_where_its_tokens_are_and_only_with_a_loss():
    """Subject 5 hides a token of stream 0, 7 one of stream 1; 2 has everything visible, and counts for nothing."""
    held = [[True] * 4] * 3
    step = mask_of([[True, False, False, False], [False, False, True, False], [False] * 4], held)
    assert has_loss(step).tolist() == [True, True, False]
    counts = Contributors(9, 2, {"a": 3}, CPU)
    counts.add(np.array([5, 7, 2]), step, routed([[0, 1], [1, 0], [2, 0]]), PLACES, YES)
    assert counts.per_stream() == [1, 1]
    assert counts.per_expert() == {"a": [2, 2, 0]}
    counts.add(np.array([5, 8, 2]), step, routed([[0, 2], [0, 2], [2, 0]]), PLACES, YES)
    assert counts.per_stream() == [1, 2]
    assert counts.per_expert() == {"a": [3, 2, 2]}
    counts.add(np.array([0, 1, 3]), step, routed([[0, 2], [0, 2], [2, 0]]), PLACES, ~YES)
    assert counts.per_stream() == [1, 2], "a step that was skipped has nobody behind it"
    assert counts.per_expert() == {"a": [3, 2, 2]}


def test_a_stream_that_is_only_shown_or_only_guessed_has_nobody_behind_the_other_half():
    step = mask_of([[True, True, False, False]] * 2, [[True] * 4] * 2)
    counts = Contributors(2, 2, {}, CPU)
    counts.add(np.array([0, 1]), step, routed(), PLACES, YES)
    assert counts.per_stream() == [0, 0]


def test_a_batch_of_which_nothing_is_hidden_has_nobody_behind_it():
    step = mask_of([[False] * 4] * 2, [[True] * 4, [True, False, False, False]])
    assert not has_loss(step).any()
    counts = Contributors(2, 2, {"a": 2}, CPU)
    counts.add(np.array([0, 1]), step, routed([[0], [1]]), PLACES, YES)
    assert counts.per_stream() == [0, 0]
    assert counts.per_expert() == {"a": [0, 0]}
