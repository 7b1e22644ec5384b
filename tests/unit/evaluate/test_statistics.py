import numpy as np
import torch

from panfm.config import StreamConfig
from panfm.data.store import ImageStore
from panfm.evaluate.statistics import StatisticsReference, measure_store
from panfm.models.patch_features import image_features

STREAM = StreamConfig(shape=(4, 4, 4), patch=(2, 2, 2), spacing_mm=(1.0, 1.0, 1.0))
STREAMS = {"brain-mr": STREAM, "liver-mr": STREAM}


def make_store(seed=0, n=6):
    generator = np.random.default_rng(seed)
    images = {name: generator.random((n - 2, 1, 4, 4, 4), dtype=np.float32) for name in STREAMS}
    rows = {"brain-mr": np.arange(n - 2), "liver-mr": np.arange(2, n)}
    return ImageStore(tuple(f"p{i}" for i in range(n)), ("train",) * n, images, rows)


def standardised(values):
    """What the probe sees of a column: its scale and centre do not matter."""
    values = np.asarray(values, dtype=np.float64)
    return (values - values.mean()) / values.std()


def test_statistics_by_a_slow_loop():
    store = make_store()
    values = measure_store(store, STREAMS)["brain-mr"].values
    volumes = store.images["brain-mr"][:, 0]
    gradients = [sum(np.abs(np.diff(v, axis=axis)).sum() for axis in range(3)) / 3 / 64 for v in volumes]
    slow = {
        0: [volume.mean() for volume in volumes],
        1: [np.log(volume.std() + 0.01) for volume in volumes],
        2: gradients,
        6: [np.sort(volume.ravel())[32] for volume in volumes],  # median, nearest rank
        10: [volume[:2, :2, :2].mean() for volume in volumes],
    }
    for column, expected in slow.items():
        np.testing.assert_allclose(standardised(values[:, column]), standardised(expected), atol=1e-4)
    assert values.shape == (4, 3 + 7 + 3 * 8)


def test_patch_features_stand_block_by_block():
    store = make_store()
    features = measure_store(store, STREAMS, tokenizer="texture")["brain-mr"]
    expected = image_features(torch.from_numpy(store.images["brain-mr"]), STREAM, "texture")
    np.testing.assert_array_equal(features.rows, store.rows["brain-mr"])
    np.testing.assert_array_equal(features.values, expected.flatten(1).numpy())
    assert features.values.shape == (4, 6 * 4**3)  # blocks of one voxel


def test_absent_streams_become_the_mean_of_the_fit_subjects():
    store = make_store()
    measured = measure_store(store, STREAMS)
    fit = np.array([0, 1, 2])
    reference = StatisticsReference.fit([(measured, fit)])
    features = reference.features(measured, np.arange(6))
    brain, liver = np.split(features, 2, axis=1)
    np.testing.assert_array_equal(brain[:4], measured["brain-mr"].values)
    np.testing.assert_allclose(brain[4], measured["brain-mr"].values[:3].mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(liver[0], measured["liver-mr"].values[0])  # only subject 2 is both fit and holder
    np.testing.assert_array_equal(liver[5], measured["liver-mr"].values[3])


def test_streams_not_named_are_treated_as_absent():
    store = make_store()
    measured = measure_store(store, STREAMS)
    reference = StatisticsReference.fit([(measured, np.arange(6))])
    brain, liver = np.split(reference.features(measured, np.array([3, 0]), ["brain-mr"]), 2, axis=1)
    np.testing.assert_array_equal(brain[0], measured["brain-mr"].values[3])
    assert (liver[0] == liver[1]).all()


def test_a_stream_that_no_fit_subject_holds_is_not_read():
    measured = measure_store(make_store(), STREAMS)
    reference = StatisticsReference.fit([(measured, np.array([0]))])
    assert list(reference.means) == ["brain-mr"]
    assert reference.features({}, np.array([0, 1])).shape[0] == 2
