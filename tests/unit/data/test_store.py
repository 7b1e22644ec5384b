import numpy as np
import pytest
import torch

from panfm.data.store import ImageStore


@pytest.fixture
def store():
    """Subject 0 holds both streams, 1 holds nothing, 2 holds the eye, 3 holds the brain."""
    return ImageStore(
        ("a", "b", "c", "d"),
        ("train", "train", "val", "test"),
        {
            "brain-mr": np.arange(2, dtype=np.float32).reshape(2, 1, 1, 1, 1),
            "eye-fundus": 10 + np.arange(2, dtype=np.float32).reshape(2, 1, 1, 1),
        },
        {"brain-mr": np.array([0, 3]), "eye-fundus": np.array([0, 2])},
    )


def test_batch_holds_only_who_holds(store):
    batch = store.batch([3, 1, 0])
    assert batch.size == 3
    assert batch.images["brain-mr"].ravel().tolist() == [1.0, 0.0]
    assert batch.rows["brain-mr"].tolist() == [0, 2]
    assert batch.images["eye-fundus"].ravel().tolist() == [10.0]
    assert batch.rows["eye-fundus"].tolist() == [2]
    assert batch.rows["eye-fundus"].dtype == torch.int64


def test_absent_streams_take_no_room(store):
    assert store.batch([1]).images == {}
    assert set(store.batch([2]).images) == {"eye-fundus"}
    assert store.batch([]).size == 0
    assert set(store.batch([0], streams=["brain-mr"]).images) == {"brain-mr"}


def test_a_subject_may_stand_twice(store):
    batch = store.batch([0, 0])
    assert batch.rows["brain-mr"].tolist() == [0, 1]


def test_batch_is_a_copy(store):
    store.batch([0]).images["brain-mr"].fill_(7)
    assert store.images["brain-mr"][0] == 0


def test_batch_moves(store):
    moved = store.batch([0]).to("cpu")
    assert moved.size == 1
    assert set(moved.images) == set(moved.rows) == {"brain-mr", "eye-fundus"}


def test_splits_and_holders(store):
    assert store.indices("train").tolist() == [0, 1]
    assert store.indices("none").tolist() == []
    assert store.num_holding("brain-mr", "train") == 1
    assert store.num_holding("brain-mr", "test") == 1
    assert store.num_holding("liver-mr", "train") == 0


def test_holders_of_streams(store):
    everyone = np.array([3, 2, 1, 0])
    for streams in (["brain-mr"], ["liver-mr"], ["brain-mr", "eye-fundus"], []):
        expected = [index for index in (3, 2, 1, 0) if any(index in store.rows.get(name, ()) for name in streams)]
        assert store.holders(everyone, streams).tolist() == expected
    assert store.holders(everyone[:0], ["brain-mr"]).tolist() == []


@pytest.fixture
def visits():
    """Subject 0 has one image, 1 none, 2 three sessions."""
    images, rows = np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1), np.array([0, 2, 2, 2])
    return ImageStore(
        ("a", "b", "c"), ("train",) * 3, {"eye-oct": images}, {"eye-oct": rows}, {"eye-oct": ["", "1", "2", "3"]}
    )


def test_a_batch_shows_one_session_of_a_subject(visits):
    batch = visits.batch([2, 1, 0, 2])
    assert batch.images["eye-oct"].ravel().tolist() == [1.0, 0.0, 1.0]
    assert batch.rows["eye-oct"].tolist() == [0, 2, 3]
    asked = []
    picked = visits.batch([2, 1, 0], pick=lambda subject, count: asked.append((subject, count)) or 2)
    assert picked.images["eye-oct"].ravel().tolist() == [3.0, 0.0]
    assert asked == [(2, 3)]


def test_a_patient_counts_once(visits):
    assert visits.num_holding("eye-oct", "train") == 2
    assert visits.holders(np.arange(3), ["eye-oct"]).tolist() == [0, 2]
