"""Kind 3: the check looks at what the model sees, not at the file."""

import numpy as np
import pytest
from PIL import Image

from panfm.anatomy import Modality
from panfm.config import StreamConfig
from panfm.data.cache import open_store
from panfm.data.check import check_site
from panfm.data.check_outputs import Output, inspect_output, out_of_line
from panfm.data.intensity import apply_intensity
from panfm.data.readers import ImageError, Volume
from panfm.errors import DataError

HU = np.random.default_rng(0).normal(0.0, 300.0, (8, 9, 10)).round().clip(-1000, 1500).astype(np.float32)
HU[:4] = -1000.0
MR = np.random.default_rng(1).integers(0, 1000, (8, 9, 10)).astype(np.float32)
MASK = (np.indices((8, 9, 10)).sum(0) % 5 == 0).astype(np.float32)
LABELS = np.minimum(np.indices((8, 9, 10)).sum(0) // 3, 7)
TISSUE = np.random.default_rng(2).normal(40.0, 30.0, (8, 9, 10))
ABDOMEN = np.where(np.indices((8, 9, 10))[0] < 6, np.random.default_rng(3).normal(-1000.0, 10.0, (8, 9, 10)), TISSUE)
CONFIG = StreamConfig(shape=(8, 8, 8), patch=(4, 4, 4), spacing_mm=(2.0, 2.0, 2.0))

FAULTY = {
    "all zero": ("brain-mr", 0 * MR, "one value all over"),
    "all zero CT": ("liver-ct", 0 * MR, "one value all over"),
    "a constant": ("brain-mr", 0 * MR + 7, "one value all over"),
    "a constant PET": ("body-pet", 0 * MR + 1e-3, "one value all over"),
    "a CT of 0 to 1": ("liver-ct", (HU + 1000) / 2500, "one value all over (0.333 to 0.334"),
    "a CT of -1 to 1": ("liver-ct", (HU - 250) / 1250, "one value all over"),
    "a CT with 1024 added": ("liver-ct", HU + 1024, "of a CT above 400, expected Hounsfield units (was 1024 added?)"),
    "a CT with 1000 added, an organ alone": ("liver-ct", HU[4:] / 10 + 1060, "of a CT above 400"),
    "a CT with 1024 added, noise below 0": ("liver-ct", ABDOMEN + 1024, "of a CT above 400"),
    "a CT with 1024 added, and padding": (
        "liver-ct",
        np.where(np.indices((8, 9, 10))[1] < 1, -2000, ABDOMEN + 1024),
        "of a CT above 400",
    ),
    "one slice, repeated": ("brain-mr", np.repeat(MR[:1], 8, axis=0), "one slice, 8 times"),
    "values that hardly differ": ("brain-mr", 1000 + MR / 1e5, "voxels within "),
    "a CT that was stored without its sign": ("liver-ct", np.where(HU < 0, HU + 65536, HU), "of a CT above 400"),
    "a CT of air alone": ("lung-ct", HU / 100 - 900, "one value all over"),
    "a mask": ("brain-mr", MASK, "100.0% of its voxels at the ends of the range"),
    "a mask of 255": ("body-pet", 255 * MASK, "100.0% of its voxels at the ends of the range"),
    "a map of labels": ("brain-mr", MASK + np.roll(MASK, 1, 0) * 2, "3 different values"),
    "a mask for a CT": ("liver-ct", MASK, "one value all over"),
    "a single slice": ("brain-mr", MR[..., :1], "a single slice (8x9x1)"),
    "a single slice on another axis": ("liver-ct", HU[:1], "a single slice (1x9x10)"),
    "one voxel that is not 0": ("brain-mr", np.where(np.arange(720).reshape(8, 9, 10) == 300, 5, 0), "at the ends"),
}


@pytest.mark.parametrize("name", FAULTY)
@pytest.mark.parametrize("config", [None, CONFIG], ids=["alone", "run"])
def test_what_shows_nothing_is_a_fault(name, config):
    stream, voxels, text = FAULTY[name]
    with pytest.raises(ImageError) as caught:
        inspect_output(Volume(voxels.astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0])), stream, config)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("stream", "voxels"),
    [("brain-mr", MR), ("liver-ct", HU), ("liver-ct", HU[4:] / 5 + 60), ("brain-mr", MR - 500), ("body-pet", MR**2)],
    ids=["MR", "CT", "a crop of the liver", "z-scored MR", "PET"],
)
def test_a_sound_image_has_neither_fault_nor_note(stream, voxels):
    output, notes = inspect_output(Volume(voxels, np.diag([2.0, 2.0, 2.0, 1.0])), stream, CONFIG)
    assert notes == ()
    assert output.deviation > 0.05


def test_a_crop_that_shows_nothing_is_a_fault_of_the_run_alone():
    """The middle is empty, the rim is not: only the prepared image tells."""
    voxels = np.zeros((24, 24, 24), np.float32)
    voxels[:4] = MR[..., :1].max() * np.random.default_rng(0).random((4, 24, 24))
    image = Volume(voxels, np.diag([2.0, 2.0, 2.0, 1.0]))
    assert inspect_output(image, "brain-mr", None)
    with pytest.raises(ImageError, match="over the part that the run's shape and spacing show"):
        inspect_output(image, "brain-mr", CONFIG)


@pytest.mark.parametrize("padding", [-1.0, -1024.0, -32768.0, -3.4e38])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_padding_below_zero_leaves_the_scale_to_the_tissue(padding, share):
    tissue = np.random.default_rng(0).integers(0, 1000, 1000).astype(np.float32)
    filled = np.where(np.arange(1000) < share * 1000, np.float32(padding), tissue)
    expected = apply_intensity(tissue[filled != padding], Modality.MR)
    scaled = apply_intensity(filled, Modality.MR)
    np.testing.assert_allclose(scaled[filled != padding], expected, atol=0 if padding > -1e37 else 1e-6)
    assert not scaled[filled == padding].any()


@pytest.mark.parametrize("padding", [-32768.0, 65535.0, 3e38])
def test_padding_far_from_a_scan_with_both_signs(padding):
    tissue = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    filled = np.where(np.arange(1000) < 200, np.float32(padding), tissue)
    scaled = apply_intensity(filled, Modality.PET)
    expected = apply_intensity(tissue[200:], Modality.PET)
    np.testing.assert_allclose(scaled[200:], expected, atol=0 if padding < 1e37 else 1e-6)
    assert set(scaled[:200].tolist()) == {float(padding > 0)}


@pytest.mark.parametrize("background", [0.0, -0.7, -0.3])
def test_a_background_that_is_no_padding_keeps_its_place(background):
    """Of a brain after extraction, or a scan whose mean was taken off, before or after extraction."""
    tissue = np.random.default_rng(0).normal(0.5, 0.7, 1000)
    scan = tissue if background == -0.7 else abs(tissue) if background else 400 + 100 * tissue
    image = np.where(np.arange(1000) < 600, background, scan).astype(np.float32)
    low, high = (float(value) for value in np.percentile(image, (1.0, 99.0)))
    expected = np.clip((image - np.float32(low)) / np.float32(high - low), 0.0, 1.0)
    np.testing.assert_array_equal(apply_intensity(image, Modality.MR), expected)


@pytest.mark.parametrize("bright", [1000.0, 4095.0])
def test_a_bright_constant_is_no_padding(bright):
    """Such as a marker, or what a scanner has cut off."""
    image = np.random.default_rng(0).uniform(0, 400, 1000).astype(np.float32)
    image[:16] = bright
    assert apply_intensity(image, Modality.MR)[16:].max() <= 400 / bright + 1e-6


def test_few_values_a_squeezed_scale_and_a_thin_scan_are_noted():
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    noted = {
        "8 different values": (LABELS, CONFIG),
        "most grey levels lie within": (np.where(MR < 25, 1e6 + MR, MR), CONFIG),
        "fills 6% of the run's shape": (MR[..., :2], CONFIG.model_copy(update={"shape": (8, 8, 32)})),
    }
    for text, (voxels, config) in noted.items():
        _, notes = inspect_output(Volume(voxels.astype(np.float32), affine), "brain-mr", config)
        assert [text in note for note in notes] == [True], notes
    _, notes = inspect_output(Volume(abs(HU) / 10, affine), "liver-ct", CONFIG)
    assert notes == ("a CT without a voxel below 0: are these Hounsfield units?",)


PICTURES = {
    "blank": np.full((9, 9), 255),
    "a mask of 0 and 1": np.eye(9),
    "a mask of 0 and 255": 255 * np.eye(9),
    "a map of labels": 80 * (np.indices((9, 9)).sum(0) % 4),
    "nearly blank": np.random.default_rng(0).integers(200, 202, (9, 9)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_shows_nothing_is_a_fault(site, name):
    Image.fromarray(PICTURES[name].astype(np.uint8)).save(site.write() / "a.png")
    site.row("a", "chest-xray", "a.png")
    site.assert_one_fault("a.png: found ")


def test_one_image_out_of_line_is_noted():
    usual = {f"s{number}": Output(0.3 + 0.01 * (number % 3), 0.2, 0.1, 0.01) for number in range(9)}
    assert list(out_of_line(usual)) == []
    told = list(out_of_line(usual | {"odd": Output(0.9, 0.2, 0.1, 0.01)}))
    assert told == [("odd", "out of line with the others of its stream: mean 0.900, theirs 0.310")]
    assert list(out_of_line({"s0": usual["s0"], "odd": Output(0.9, 0.2, 0.1, 0.01)})) == []


def test_the_command_tells_faults_and_notes_by_file(site, streams):
    for subject in "abcdefgh":
        site.add(subject)
    site.add("thin", voxels=np.random.default_rng(9).integers(0, 900, (8, 8, 1)).astype(np.int16))
    site.add("labels", voxels=LABELS.astype(np.int16))
    result = site.check()
    assert result.exit_code == 1
    assert "thin_brain-mr.nii.gz: found a single slice (8x8x1), expected a volume of several slices" in result.output
    assert "note: labels_brain-mr.nii.gz: 8 different values: a map of labels?" in result.output
    for report in (check_site(site.folder), check_site(site.folder, streams)):
        assert [fault.file for fault in report.faults] == ["thin_brain-mr.nii.gz"]


CONSTANT = {name: FAULTY[name] for name in FAULTY if "one value all over" in FAULTY[name][2]}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_run_refuses_what_shows_one_value_and_says_how_to_leave_it_out(site, name):
    stream, voxels, _ = CONSTANT[name]
    for seed, subject in enumerate("ab"):
        site.add(subject, stream, np.random.default_rng(seed).normal(0.0, 300.0, (8, 9, 10)).astype(np.float32))
    site.add("flat", stream, voxels.astype(np.float32))
    with pytest.raises(DataError) as caught:
        open_store(site.folder, {stream: CONFIG})
    assert str(caught.value).startswith(f"{site.folder}/flat_{stream}.nii.gz: found one value all over (")
    assert str(caught.value).endswith("(panfm site check --quarantine leaves it out)")
    assert site.check("--quarantine").exit_code == 0
    assert open_store(site.folder, {stream: CONFIG}).subjects == ("a", "b")


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_run_refuses_a_blank_picture(site, mode, channels):
    Image.fromarray(np.full((9, 9), 7, np.uint16 if mode == "I;16" else np.uint8)).convert(mode).save(
        site.write() / "a.png"
    )
    site.row("a", "chest-xray", "a.png")
    config = StreamConfig(shape=(8, 8), patch=(4, 4), channels=channels)
    with pytest.raises(DataError, match=r"a.png: found one value all over .* expected grey levels of 0 to 255"):
        open_store(site.folder, {"chest-xray": config})
    (site.folder / "site.toml").write_text('name = "clinic"\nconstant-images = "take"\n')
    assert np.ptp(open_store(site.folder, {"chest-xray": config}).images["chest-xray"]) == 0


def test_a_part_that_shows_nothing_is_told_and_not_refused(site, caplog):
    """A server chooses the part: its refusals would say where an image is flat."""
    hollow = np.random.default_rng(0).integers(0, 999, (24, 24, 24)).astype(np.int16)
    hollow[4:20, 4:20, 4:20] = 5
    site.add("hollow", voxels=hollow)
    assert np.ptp(open_store(site.folder, {"brain-mr": CONFIG}).images["brain-mr"]) == 0
    assert "hollow_brain-mr.nii.gz: one value all over the part that the run's shape" in caplog.text


@pytest.mark.parametrize("paddings", [(-1024, -2000), (-1, -2), (-32768, -1), (-1, -1024, -2000), (-2000,)])
@pytest.mark.parametrize("modality", [Modality.MR, Modality.PET])
def test_several_paddings_in_one_image_leave_the_scale_to_the_tissue(paddings, modality):
    tissue = np.random.default_rng(3).integers(0, 900, 2000).astype(np.float32)
    filled = tissue.copy()
    for number, padding in enumerate(paddings):
        filled[100 * number : 100 * (number + 1)] = padding
    rest = len(paddings) * 100
    scaled = apply_intensity(filled, modality)
    np.testing.assert_array_equal(scaled[rest:], apply_intensity(tissue[rest:], modality))
    assert not scaled[:rest].any()


@pytest.mark.parametrize(
    "negative", [(-1, -2, -3, -4), (-1.5, -2.5), (-700, -20)], ids=["four", "no whole numbers", "a few voxels"]
)
def test_other_negative_numbers_are_no_padding(negative):
    image = np.random.default_rng(3).integers(0, 900, 2000).astype(np.float32)
    for number, value in enumerate(negative):
        image[100 * number : 100 * number + (5 if value == -20 else 100)] = value
    low, high = np.percentile(image, (1, 99))
    expected = np.clip((image - np.float32(low)) / np.float32(high - low), 0, 1)
    np.testing.assert_allclose(apply_intensity(image, Modality.MR), expected, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_of_which_one_slice_shows_anything_is_a_fault(axis):
    voxels = np.zeros((12, 12, 12), dtype=np.float32)
    np.moveaxis(voxels, axis, 0)[4] = np.random.default_rng(0).uniform(100, 900, (12, 12))
    with pytest.raises(ImageError, match="one of 12 slices that shows anything, expected a volume of several"):
        inspect_output(Volume(voxels, np.eye(4)), "brain-mr", None)
    np.moveaxis(voxels, axis, 0)[5] = np.moveaxis(voxels, axis, 0)[4].T
    inspect_output(Volume(voxels, np.eye(4)), "brain-mr", None)
