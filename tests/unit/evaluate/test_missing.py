import itertools

import numpy as np
import pytest

from panfm.evaluate.probe_cohort import missing_grid, removed_sets

STREAMS = ("brain-mr", "brain-ct", "heart-ct", "liver-mr", "kidney-mr")
WORTH = {"brain-mr": 8.0, "brain-ct": 4.0, "heart-ct": 2.0, "liver-mr": 1.0, "kidney-mr": 0.5}


def worth(streams):
    return np.array([[sum(WORTH[stream] for stream in streams)]])


def grid(**options):
    return missing_grid(worth, lambda features: float(features[0, 0]), STREAMS, **options)


def test_grid_by_hand():
    found = grid(dominant=("heart", "brain"))
    assert found["auc"] == 15.5
    assert found["auc_drop_brain"] == 12.0  # both of its streams go
    assert found["auc_drop_kidney"] == 0.5
    assert found["auc_only_heart"] == 2.0
    assert found["auc_no_dominant"] == 1.5
    assert found["auc_missing_1"] == pytest.approx(15.5 - 15.5 / 4)
    assert found["auc_missing_3"] == pytest.approx(15.5 / 4)
    assert "auc_missing_4" not in found


def test_grid_with_all_sets_equals_the_slow_loop():
    found = grid(draws=100)
    organs = {"brain": 12.0, "heart": 2.0, "liver": 1.0, "kidney": 0.5}
    for count in (1, 2, 3):
        left = [sum(organs.values()) - sum(organs[o] for o in gone) for gone in itertools.combinations(organs, count)]
        assert found[f"auc_missing_{count}"] == pytest.approx(np.mean(left))


def test_draws_are_different_sets_and_follow_the_seed():
    organs = list("abcdefg")
    chosen = removed_sets(organs, 3, 5, seed=1)
    assert len(set(chosen)) == 5
    assert all(len(each) == 3 for each in chosen)
    assert chosen == removed_sets(organs[::-1], 3, 5, seed=1)
    assert chosen != removed_sets(organs, 3, 5, seed=2)
    assert len(removed_sets(organs, 6, 1, seed=0)) == 7


def test_nothing_is_computed_twice():
    asked = []

    def features(streams):
        asked.append(streams)
        return worth(streams)

    missing_grid(features, lambda each: float(each[0, 0]), STREAMS, dominant=("heart",))
    assert len(asked) == len(set(asked))


def test_one_organ_has_only_the_complete_cell():
    assert missing_grid(worth, lambda each: float(each[0, 0]), STREAMS[:2], dominant=("brain",)) == {"auc": 12.0}
