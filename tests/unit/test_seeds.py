import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from panfm.seeds import derive_seed, numpy_generator, torch_generator

PARTS = st.lists(st.text(alphabet="ab1:\x1f", max_size=3) | st.integers(0, 20), max_size=3)


def test_known_value():
    """Changing it breaks the resume of every run under way."""
    assert derive_seed(0, "site-a", 3, "masking") == 7557980846876134070


def test_parts_are_separated_and_typed():
    seeds = [derive_seed(0, *parts) for parts in [("a", "bc"), ("ab", "c"), ("abc",), (1,), ("1",), (), ("",)]]
    assert len(set(seeds)) == len(seeds)
    assert derive_seed(0, "a") != derive_seed(1, "a")


@given(st.integers(), PARTS)
def test_range(run_seed, parts):
    assert 0 <= derive_seed(run_seed, *parts) < 2**63


def test_generators_draw_alike_and_leave_the_global_ones_alone():
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for make, draw in (
        (torch_generator, lambda g: torch.rand(3, generator=g)),
        (numpy_generator, lambda g: g.random(3)),
    ):
        first, second, other = make(1, "x"), make(1, "x"), make(1, "y")
        assert draw(first).tolist() == draw(second).tolist() != draw(other).tolist()
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
