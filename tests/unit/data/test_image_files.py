import nibabel as nib
import numpy as np
import pytest

from panfm.config import StreamConfig
from panfm.data.image_files import store_of_files
from panfm.data.read import read_image
from panfm.errors import DataError

STREAM = StreamConfig(shape=(4, 4, 4), patch=(2, 2, 2), spacing_mm=(1.0, 1.0, 1.0))


def test_each_file_is_a_subject(tmp_path):
    paths = [tmp_path / "a.nii.gz", tmp_path / "b.1.nii"]
    for number, path in enumerate(paths):
        voxels = np.random.default_rng(number).random((4, 4, 4)).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    store = store_of_files(paths, "brain-mr", STREAM)
    assert (store.subjects, store.splits) == (("a", "b.1"), ("test", "test"))
    np.testing.assert_array_equal(store.images["brain-mr"][1], read_image(paths[1], "brain-mr", STREAM))
    with pytest.raises(DataError, match=r"b.1.nii: the same subject as .*b.1.nii"):
        store_of_files([paths[1], tmp_path / "x" / "b.1.nii"], "brain-mr", STREAM)
    with pytest.raises(DataError, match=r"none.nii: found no such file"):
        store_of_files([tmp_path / "none.nii"], "brain-mr", STREAM)
