import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from panfm.data.readers import ImageError
from panfm.errors import DataError
from panfm.planning.image_sizes import ImageSize, read_size, survey_sites


def test_a_volumes_size_is_told_along_r_a_s(tmp_path):
    """Stored as S, R, A with R reversed."""
    affine = np.array([[0, -2.0, 0, 0], [0, 0, 3.0, 0], [5.0, 0, 0, 0], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(np.zeros((4, 6, 8), np.int16), affine), tmp_path / "x.nii.gz")
    assert read_size(tmp_path / "x.nii.gz") == ImageSize((6, 8, 4), (2.0, 3.0, 5.0))


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("1", 1)])
def test_a_pictures_size_is_height_and_width(tmp_path, mode, channels):
    Image.new(mode, (30, 20)).save(tmp_path / "x.png")
    assert read_size(tmp_path / "x.png") == ImageSize((20, 30), (), channels)


def test_no_voxel_is_read(tmp_path):
    """A volume that is cut off after its header still has a size; `panfm site check` finds the rest."""
    nib.save(nib.Nifti1Image(np.zeros((4, 6, 8), np.int16), np.eye(4)), tmp_path / "x.nii")
    (tmp_path / "x.nii").write_bytes((tmp_path / "x.nii").read_bytes()[:360])
    assert read_size(tmp_path / "x.nii").shape == (4, 6, 8)


@pytest.mark.parametrize("content", [b"", b"not a header"])
def test_a_broken_header_is_an_image_error(tmp_path, content):
    (tmp_path / "x.nii").write_bytes(content)
    with pytest.raises(ImageError, match="a broken NIfTI header"):
        read_size(tmp_path / "x.nii")


def test_sites_are_surveyed_and_faults_are_told(tmp_path, write_site):
    sites = [write_site(tmp_path / name, name, ("brain",), subjects=3) for name in ("a", "b")]
    (sites[1] / "b-0-brain.nii.gz").write_bytes(b"x")
    survey = survey_sites(sites)
    assert survey.train_subjects == {"a": 2, "b": 2}
    assert survey.streams["brain-mr"].by_site == {"a": 3, "b": 2}
    assert set(survey.streams["brain-mr"].sizes) == {ImageSize((8, 8, 8), (8.0, 8.0, 8.0))}
    [fault] = survey.faults
    assert fault.startswith(f"{sites[1]}/b-0-brain.nii.gz: found ")


def test_what_cannot_be_planned_is_one_line(tmp_path, write_site):
    a, b = (write_site(tmp_path / name, "same", ("brain",), subjects=3) for name in ("a", "b"))
    with pytest.raises(DataError, match="two of the sites have the same name"):
        survey_sites([a, b])
    text = (a / "manifest.csv").read_text()
    (a / "manifest.csv").write_text(text.replace(",train", ",test"))
    with pytest.raises(DataError, match="site same: no subject in split train"):
        survey_sites([a])
    Image.new("L", (8, 8)).save(a / "x.png")
    (a / "manifest.csv").write_text(f"{text}new,brain-mr,x.png,train\n")
    with pytest.raises(DataError, match="stream brain-mr: has volumes and pictures"):
        survey_sites([a])
