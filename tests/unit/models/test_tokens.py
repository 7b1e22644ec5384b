"""Packing and selecting patches, against plain Python lists."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from panfm.models.tokens import Layout, gather_tokens, pack, sincos_positions


def places(layout: Layout) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(layout.patch_index, layout.valid, strict=True)]


def test_pack_by_hand():
    present = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    layout = pack(present, torch.tensor([0, 0, 1, 2, 2]))
    assert places(layout) == [[0, 1, 3, 4], [], [2]]


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6))
def test_select_keeps_order_and_remembers_columns(keep):
    layout = pack(torch.ones(len(keep), 1, dtype=torch.bool), torch.zeros(5, dtype=torch.long))
    smaller, column = layout.select(torch.tensor(keep))
    expected = [[place for place, kept in enumerate(row) if kept] for row in keep]
    assert places(smaller) == expected
    assert smaller.patch_index.shape[1] == max(map(len, expected))
    tokens = torch.arange(5.0).expand(len(keep), 5)[..., None]
    picked = gather_tokens(tokens, column)[..., 0]
    assert [row[ok].int().tolist() for row, ok in zip(picked, smaller.valid, strict=True)] == expected


def test_gathered_tokens_and_their_gradients_are_those_of_one_row_after_the_other():
    """A column that is named twice gets both gradients; subject by subject under vmap, as privacy takes them, too."""
    random = torch.Generator().manual_seed(0)
    tokens, up = torch.randn(3, 5, 2, generator=random), torch.randn(3, 4, 2, generator=random)
    column = torch.tensor([[4, 0, 2, 0], [1, 1, 1, 1], [3, 2, 1, 0]])
    expected = torch.zeros_like(tokens)
    for b, row in enumerate(column.tolist()):
        for k, place in enumerate(row):
            assert torch.equal(gather_tokens(tokens, column)[b, k], tokens[b, place])
            expected[b, place] += up[b, k]
    leaf = tokens.clone().requires_grad_()
    (gather_tokens(leaf, column) * up).sum().backward()
    assert torch.equal(leaf.grad, expected)

    def one(tokens, column, up):
        return (gather_tokens(tokens[None], column[None])[0] * up).sum()

    assert torch.equal(torch.func.vmap(torch.func.grad(one))(tokens, column, up), expected)


def test_select_never_keeps_padding():
    layout = pack(torch.tensor([[True, True], [True, False]]), torch.tensor([0, 1]))
    smaller, _ = layout.select(torch.ones(2, 2, dtype=torch.bool))
    assert places(smaller) == [[0, 1], [0]]


@pytest.mark.parametrize("grid", [(2, 2, 2), (4, 3), (1, 1, 1)])
@pytest.mark.parametrize("width", [48, 50, 7])
def test_positions_are_distinct_and_bounded(grid, width):
    table = sincos_positions(grid, width)
    assert table.shape == (torch.Size(grid).numel(), width)
    assert table.abs().max() <= 1.0
    assert len(torch.unique(table, dim=0)) == len(table)


def test_position_by_hand():
    table = sincos_positions((2, 1), 4)
    assert_close(
        table[1],
        torch.tensor([1.0, 1.0, 0.0, 1.0]).sin() * torch.tensor([1.0, 0, 0, 0])
        + torch.tensor([0.0, torch.tensor(1.0).cos().item(), 0.0, 1.0]),
    )
