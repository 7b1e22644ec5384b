"""Prepared images in the type of their sources: what comes back, and what a cache holds."""

import itertools

import nibabel
import numpy as np
import pytest
from PIL import Image

from panfm.config import StreamConfig, parse_run
from panfm.data.cache import open_store
from panfm.data.cache_build import widened
from panfm.data.packed import FLOAT16, TYPES, Packed, PackedImages
from panfm.data.read import read_image

U1, U2, F4 = TYPES.values()


def test_a_volume_is_counted_from_its_least_to_its_greatest_value():
    image = np.float32([[0.25, 0.5, 0.75]])
    packed = Packed.of(image, U1, is_volume=True)
    assert packed.stored.tolist() == [[0, 128, 255]]  # 127.5 goes to the even number
    assert (packed.low, packed.high) == (0.25, 0.75)
    np.testing.assert_allclose(packed.values(), [[0.25, 0.25 + 0.5 * 128 / 255, 0.75]], rtol=1e-6)


def test_an_8_bit_picture_comes_back_to_the_bit():
    picture = np.clip(np.arange(256, dtype=np.float32)[None] / np.float32(255.0), 0.0, 1.0)
    for kept in (U1, U2, F4):
        packed = widened(Packed.of(picture, U1, is_volume=False), kept)
        assert packed.stored.dtype == kept
        assert packed.values().tobytes() == picture.tobytes()


@pytest.mark.parametrize(("kept", "steps"), [(U1, 255), (U2, 65535)])
def test_no_value_moves_by_more_than_half_a_step_or_leaves_the_range(kept, steps):
    random = np.random.default_rng(0)
    for low, high in [(0.0, 1.0), (0.3, 0.7), (0.1, 0.1 + 1e-6), (0.9, 1.0)]:
        image = random.uniform(low, high, size=(1, 9, 9)).astype(np.float32)
        values = Packed.of(image, kept, is_volume=True).values()
        least = np.spacing(np.float32(1.0))
        np.testing.assert_allclose(values, image, atol=0.5 * (high - low) / steps + 2 * least, rtol=0)
        assert values.min() == image.min()
        assert values.max() <= image.max()
        assert (np.argsort(values, axis=None) == np.argsort(values.astype(np.float64), axis=None)).all()


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_an_image_of_one_value_stays_as_it_is(value):
    image = np.full((1, 4, 4), value, dtype=np.float32)
    for kept in (U1, U2, F4):
        assert (Packed.of(image, kept, is_volume=True).values() == image).all()


def test_a_wider_type_has_the_same_bits():
    image = np.random.default_rng(1).random((1, 8, 8, 8), dtype=np.float32)
    narrow = Packed.of(image, U1, is_volume=True)
    for kept in (U2, F4):
        assert widened(narrow, kept).values().tobytes() == narrow.values().tobytes()
    np.testing.assert_allclose(widened(narrow, FLOAT16).values(), narrow.values(), rtol=1e-3)


def test_an_index_gives_what_that_of_an_array_would():
    random = np.random.default_rng(2)
    stored, ends = random.integers(0, 256, size=(5, 1, 4, 3), dtype=np.uint8), random.random((5, 2), dtype=np.float32)
    images = PackedImages(stored, np.sort(ends, axis=1))
    array = np.asarray(images)
    assert (array.shape, array.dtype, len(images)) == ((5, 1, 4, 3), np.float32, 5)
    indices = (2, slice(1, 4), np.array([4, 0, 0]), np.array([True, False] * 2 + [True]), (3, 0), (slice(1, 3), 0, 1))
    for index in indices:
        np.testing.assert_array_equal(images[index], array[index])
    assert all((one == other).all() for one, other in itertools.zip_longest(images, array))


SITE = 'name = "alpha"\n'
RUN = """
name = "kinds"
[streams]
brain-mr = { spacing-mm = [3.0, 3.0, 3.0], shape = [8, 8, 8], patch = [4, 4, 4] }
eye-fundus = { shape = [8, 8], patch = [4, 4], channels = 3 }
chest-xray = { shape = [8, 8], patch = [4, 4] }
"""


def write_site(folder, kinds, site=SITE):
    """A subject for each voxel type, with a volume and two pictures."""
    random, rows = np.random.default_rng(3), ["subject,stream,path"]
    (folder / "site.toml").write_text(site)
    for number, kind in enumerate(kinds):
        voxels = random.uniform(0, 120, size=(12, 12, 12)).astype(kind)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0])), folder / f"{number}.nii.gz")
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(random.integers(0, 65536, (16, 16), dtype=np.uint16)).save(folder / f"{number}-x.png")
        names = {"brain-mr": ".nii.gz", "eye-fundus": ".png", "chest-xray": "-x.png"}
        rows += [f"s{number},{stream},{number}{name}" for stream, name in names.items()]
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return open_store(folder, parse_run(RUN).streams)


@pytest.mark.parametrize(
    ("kinds", "kept"),
    [
        (["u1", "i1"], U1),
        (["i2", "u2"], U2),
        (["u1", "i2"], U2),
        (["i4"], F4),
        (["f4"], F4),
        (["f8", "u1"], F4),
    ],
)
def test_a_cache_has_the_widest_type_of_its_sources(tmp_path, kinds, kept):
    store = write_site(tmp_path, kinds)
    volumes = store.images["brain-mr"]
    assert getattr(volumes, "stored", volumes).dtype == kept
    assert store.images["eye-fundus"].stored.dtype == U1
    assert store.images["chest-xray"].stored.dtype == U2
    for stream, config in parse_run(RUN).streams.items():
        for number in range(len(kinds)):
            suffix = {"brain-mr": ".nii.gz", "eye-fundus": ".png", "chest-xray": "-x.png"}[stream]
            image = read_image(tmp_path / f"{number}{suffix}", stream, config)
            assert store.images[stream][number].tobytes() == image.tobytes()
    files = {path.name.split(".")[0]: path.stat().st_size for path in (tmp_path / ".panfm/cache").glob("*.npy")}
    voxels = {"brain-mr": 512, "eye-fundus": 192, "chest-xray": 64}
    for stream, itemsize in (("brain-mr", kept.itemsize), ("eye-fundus", 1), ("chest-xray", 2)):
        assert files[stream] == 128 + len(kinds) * (voxels[stream] * itemsize + 24)


def test_a_site_may_keep_floats_in_half_of_the_space(tmp_path):
    for name in ("whole", "half"):
        (tmp_path / name).mkdir()
    whole = write_site(tmp_path / "whole", ["f4", "f4"]).images["brain-mr"]
    half = write_site(tmp_path / "half", ["f4", "f4"], SITE + 'float-images = "float16"\n')
    assert half.images["brain-mr"].stored.dtype == FLOAT16
    assert half.batch([0]).images["brain-mr"].numpy().dtype == np.float32
    np.testing.assert_allclose(half.images["brain-mr"], whole, rtol=1e-3, atol=1e-4)
    again = open_store(tmp_path / "half", parse_run(RUN).streams).images["brain-mr"]
    assert np.asarray(again).tobytes() == np.asarray(half.images["brain-mr"]).tobytes()


def test_a_scan_of_a_narrow_range_keeps_its_steps(tmp_path):
    """Stored in steps of 0.01 HU, 1 / 60000 of the window."""
    config = StreamConfig(spacing_mm=(2.0, 2.0, 2.0), shape=(8, 8, 8), patch=(4, 4, 4))
    steps = np.arange(512, dtype=np.int16).reshape(8, 8, 8)
    image = nibabel.Nifti1Image(steps, np.diag([2.0, 2.0, 2.0, 1.0]))
    image.header.set_slope_inter(0.01, 50.0)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    values = np.unique(read_image(tmp_path / "scan.nii.gz", "heart-ct", config))
    assert len(values) == 512
    np.testing.assert_allclose(np.diff(values), 0.01 / 600, rtol=0.02)
