import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panfm.planning.image_sizes import ImageSize
from panfm.planning.stream_proposal import percentiles, propose_stream


def volumes(shape, spacing, count=3):
    return [ImageSize(shape, spacing)] * count


@pytest.mark.parametrize(
    ("shape", "spacing", "expected"),
    [
        ((36, 50, 36), (1.0, 1.0, 1.0), ((40, 56, 40), (1.0, 1.0, 1.0), (8, 8, 8))),  # as they are
        ((256, 256, 256), (1.0, 1.0, 1.0), ((64, 64, 64), (4.0, 4.0, 4.0), (8, 8, 8))),  # 64 voxels at most
        ((512, 512, 40), (0.8, 0.8, 10.0), ((64, 64, 40), (6.4, 6.4, 10.0), (8, 8, 8))),  # thick slices stay
        ((64, 64, 5), (1.0, 1.0, 1.0), ((64, 64, 5), (1.0, 1.0, 1.0), (8, 8, 5))),  # one patch through a thin scan
        ((1, 1, 1), (1.0, 1.0, 1.0), ((1, 1, 1), (1.0, 1.0, 1.0), (1, 1, 1))),
    ],
)
def test_volumes(shape, spacing, expected):
    stream = propose_stream(volumes(shape, spacing))
    assert (stream.shape, stream.spacing_mm, stream.patch) == expected


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [
        ((512, 512), 1, ((64, 64), (8, 8), 1)),
        ((1024, 512), 3, ((64, 32), (8, 8), 3)),
        ((28, 28), 3, ((28, 28), (4, 4), 3)),
        ((2, 300), 1, ((8, 64), (8, 8), 1)),
        ((1, 1), 1, ((4, 4), (4, 4), 1)),
    ],
)
def test_pictures(shape, channels, expected):
    stream = propose_stream([ImageSize(shape, (), channels)] * 3)
    assert (stream.shape, stream.patch, stream.channels) == expected


@pytest.mark.parametrize("side", [64, 48, 32, 24, 16])
def test_a_coarser_stream_covers_the_same_extent_with_fewer_voxels(side):
    stream = propose_stream(volumes((64, 50, 20), (1.0, 1.0, 3.0)), side)
    assert max(stream.shape) <= side
    assert (np.array(stream.shape) * np.array(stream.spacing_mm) >= (64, 50, 60)).all()
    assert max(propose_stream([ImageSize((512, 300), ())], side).shape) <= side


def test_the_median_spacing_and_the_95th_percentile_of_extents_count():
    sizes = [*volumes((20, 20, 20), (1.0, 1.0, 1.0), 99), ImageSize((200, 200, 200), (3.0, 3.0, 3.0))]
    assert propose_stream(sizes).shape == (24, 24, 24)
    np.testing.assert_allclose(percentiles(sizes)[1], (20, 20, 20))


@settings(max_examples=20)
@given(st.tuples(*[st.integers(1, 1000)] * 3), st.tuples(*[st.floats(0.05, 50.0)] * 3))
def test_any_volume_gives_a_stream_that_covers_it(shape, spacing):
    """A stream that does not hold would be refused by its class."""
    stream = propose_stream(volumes(shape, spacing))
    extents = np.array(shape) * np.array(spacing)
    assert (np.array(stream.shape) * np.array(stream.spacing_mm) >= extents * (1 - 1e-4)).all()
    assert max(stream.shape) <= 64
    assert np.prod(stream.grid) <= 512


def test_a_scan_as_large_as_a_house_gives_a_stream():
    assert propose_stream(volumes((5000, 1, 1), (100.0, 1.0, 1.0))).spacing_mm == (1000.0, 1000.0, 1000.0)
