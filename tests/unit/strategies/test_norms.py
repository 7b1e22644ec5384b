"""Norm bounds: absolute, and against what was usual."""

import pytest

from panfm.errors import ProtocolError
from strategies.norms import check_norm, remember


def test_the_absolute_bound_by_hand(make_run):
    """learning rate 0.003, 4 local steps, limit 10: root mean square 0.12; 4 numbers: norm 0.24."""
    check_norm(make_run(), "backbone", 0.2399, 4, {})
    with pytest.raises(
        ProtocolError, match=r"^backbone: norm 0.24, expected at most 0.24 \(sharing.guards.norm-limit\)"
    ):
        check_norm(make_run(), "backbone", 0.2401, 4, {})
    with pytest.raises(ProtocolError, match="norm inf"):
        check_norm(make_run(), "backbone", float("inf"), 4, {})


def test_a_group_may_have_a_bound_of_its_own(make_run):
    run = make_run("[sharing.groups.stream]\nnorm-limit = 1.0\n[sharing.groups.'stream:brain-mr']\nnorm-limit = 2.0\n")
    check_norm(run, "head", 0.23, 4, {})
    check_norm(run, "stream:brain-mr", 0.047, 4, {})
    for group, found in (("stream:brain-mr", 0.049), ("stream:heart-ct", 0.025)):
        with pytest.raises(ProtocolError, match="norm-limit"):
            check_norm(run, group, found, 4, {})


def test_the_relative_bound_by_hand(make_run):
    """Usual: 0.003 (median of the rounds); at most 30 times as much."""
    past = {"backbone": (0.001, 0.003, 0.2)}
    check_norm(make_run(), "backbone", 0.0899, 4, past)
    with pytest.raises(ProtocolError, match=r"norm 0.0901, expected at most 0.09 \(sharing.guards.norm-ratio\)"):
        check_norm(make_run(), "backbone", 0.0901, 4, past)
    check_norm(make_run(), "head", 0.0901, 4, past)
    check_norm(make_run(), "backbone", 0.0901, 4, {"backbone": (0.0, 0.0)})


def test_memory_of_ten_rounds():
    past = {"head": (7.0,)}
    for number in range(12):
        past = remember(past, [{"backbone": number + 0.5}, {"backbone": 100.0}, {"backbone": number - 1.0}])
    assert past == {"head": (7.0,), "backbone": tuple(number + 0.5 for number in range(2, 12))}
    assert remember(past, []) == past
