"""Kind 5: geometry believed from one field of the header."""

import struct

import nibabel as nib
import numpy as np
import pytest

from panfm.data.readers import ImageError
from panfm.data.readers.nifti import decode_volume

VOXELS = np.arange(64, dtype=np.int16).reshape(4, 4, 4)
TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
OFFSETS = {nib.Nifti1Image: {"vox_offset": 108, "pixdim": 76, "xyzt_units": 123, "float": "<f"}}
OFFSETS[nib.Nifti2Image] = {"vox_offset": 168, "pixdim": 104, "xyzt_units": 500, "float": "<d"}


def affine_of(sizes, turn=None):
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if turn is None else turn) @ np.diag(sizes)
    return affine


def content(*, sform=None, qform=None, zooms=None, kind=nib.Nifti1Image):
    image = kind(VOXELS, None)
    if qform is not None:
        image.header.set_qform(qform, code=1)
    if sform is not None:
        image.header.set_sform(sform, code=1)
    if zooms is not None:
        image.header.set_zooms(zooms)
    return bytearray(image.to_bytes())


def refused(raw) -> str:
    with pytest.raises(ImageError) as caught:
        decode_volume(bytes(raw))
    return str(caught.value)


MM, THIN = affine_of((2, 2, 3)), affine_of((2, 2, 6))


@pytest.mark.parametrize("kind", OFFSETS)
@pytest.mark.parametrize(
    "forms",
    [
        {"sform": MM, "zooms": (2, 2, 3)},
        {"qform": MM},
        {"sform": MM, "qform": MM},
        {"sform": affine_of((2, 2, 3), TURN), "qform": MM},
        {"sform": MM * [[1.004, 1, 1, 1]] * 1.0, "qform": MM},
    ],
    ids=["sform", "qform", "both", "a tilt", "rounding"],
)
def test_one_statement_or_two_that_agree(forms, kind):
    volume = decode_volume(bytes(content(kind=kind, **forms)))
    np.testing.assert_allclose(np.linalg.norm(volume.affine[:3, :3], axis=0), (2, 2, 3), rtol=0.01)
    np.testing.assert_array_equal(volume.voxels, VOXELS)


@pytest.mark.parametrize("kind", OFFSETS)
@pytest.mark.parametrize(
    "forms",
    [
        {"sform": THIN, "zooms": (2, 2, 3)},
        {"sform": THIN, "qform": MM},
        {"sform": MM, "qform": MM, "zooms": (2, 2, 6)},
        {"sform": THIN, "zooms": (1, 1, 1)},
        {"sform": affine_of((3, 2, 2)), "qform": affine_of((2, 2, 3))},
        {"sform": affine_of((2.1, 2, 3)), "qform": MM},
    ],
)
def test_voxel_sizes_that_disagree(forms, kind):
    told = refused(content(kind=kind, **forms))
    assert "mm by the affine, " in told
    assert told.endswith(" by pixdim, expected one voxel size")


@pytest.mark.parametrize("tilt", [0.0, 0.3, 1.1, 2.0])
def test_oblique_scans_at_45_degrees_are_sound(tilt):
    turned = MM.copy()
    half, cosine, sine = np.sqrt(0.5), np.cos(tilt), np.sin(tilt)
    about_z = np.array([[half, -half, 0.0], [half, half, 0.0], [0.0, 0.0, 1.0]])
    about_x = np.array([[1.0, 0.0, 0.0], [0.0, cosine, -sine], [0.0, sine, cosine]])
    turned[:3, :3] = about_x @ about_z @ MM[:3, :3]
    decode_volume(content(sform=turned, qform=turned))


def test_orientations_that_disagree():
    told = refused(content(sform=affine_of((-2, 2, 3)), qform=MM))
    assert told == "found two orientations (sform LAS, qform RAS), expected one orientation"


@pytest.mark.parametrize("kind", OFFSETS)
@pytest.mark.parametrize("size", [0.0, -2.0, float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["sform", "qform"])
@pytest.mark.parametrize("axis", [1, 3])
def test_a_pixdim_that_is_no_size(kind, size, form, axis):
    raw, at = content(kind=kind, zooms=(2, 2, 3), **{form: MM}), OFFSETS[kind]
    step = struct.calcsize(at["float"])
    struct.pack_into(at["float"], raw, at["pixdim"] + step * axis, size)
    assert refused(raw).startswith("found ")


@pytest.mark.parametrize("offset", [0, 1, 100, 347, 351])
def test_voxels_that_begin_in_the_header(offset):
    raw = content(sform=MM, zooms=(2, 2, 3))
    struct.pack_into("<f", raw, 108, offset)
    assert "offset" in refused(raw)
    raw = content(sform=MM, zooms=(2, 2, 3), kind=nib.Nifti2Image)
    struct.pack_into("<q", raw, 168, offset)
    assert "offset" in refused(raw)


@pytest.mark.parametrize("offset", [368.0, float("nan"), float("inf"), -352.0])
def test_voxels_that_begin_elsewhere_are_not_there(offset):
    raw = content(sform=MM, zooms=(2, 2, 3))
    struct.pack_into("<f", raw, 108, offset)
    assert refused(raw).startswith("found ")


@pytest.mark.parametrize("kind", OFFSETS)
@pytest.mark.parametrize(
    ("code", "in_mm"), [(0, 1.0), (1, 1000.0), (2, 1.0), (3, 0.001), (2 | 8, 1.0), (3 | 16, 0.001)]
)
def test_units_are_honoured(kind, code, in_mm):
    sizes = np.array([2.0, 2.0, 3.0]) / in_mm
    raw = content(sform=affine_of(sizes), zooms=sizes, kind=kind)
    raw[OFFSETS[kind]["xyzt_units"]] = code
    np.testing.assert_allclose(decode_volume(bytes(raw)).affine, MM, rtol=1e-6)


@pytest.mark.parametrize("code", [4, 5, 6, 7])
def test_units_that_there_are_not(code):
    raw = content(sform=MM, zooms=(2, 2, 3))
    raw[123] = code
    assert f"a unit of length that NIfTI does not have ({code}), expected m, mm or um" in refused(raw)


@pytest.mark.parametrize("code", [1, 3])
def test_millimetres_that_are_called_otherwise(code):
    raw = content(sform=MM, zooms=(2, 2, 3))
    raw[123] = code
    assert ", expected 0.01 to 100 mm" in refused(raw)


def test_the_check_names_the_file(site):
    site.write()
    (site.folder / "a.nii").write_bytes(content(sform=THIN, zooms=(2, 2, 3)))
    site.row("a", path="a.nii")
    site.assert_one_fault(
        "a.nii: found voxels of 2 x 2 x 6 mm by the affine, 2 x 2 x 3 by pixdim, expected one voxel size"
    )
