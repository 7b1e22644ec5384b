import nibabel as nib
import numpy as np
import pytest

from panfm.config import StreamConfig
from panfm.data.store import ImageStore
from panfm.errors import DataError
from panfm.evaluate.probe_labels import LabelInfo, LabelledStore, label_groups, read_label_info


def test_groups_hold_yes_no_labels_only():
    info = {
        "a": LabelInfo("category", weak=True),
        "b": LabelInfo("category"),
        "c": LabelInfo("volume"),
    }
    assert label_groups(info) == {"all": ["a", "b"], "weak": ["a"], "category": ["a", "b"]}
    assert label_groups({"c": LabelInfo("volume")}) == {}
    assert label_groups({"d": LabelInfo("class")}) == {"all": ["d"]}


def test_a_label_that_a_place_lacks_is_unknown():
    place = LabelledStore(ImageStore(("p", "q"), ("train", "test"), {}, {}), {"a": np.array([1.0, 0.0])})
    values = place.values(["a", "b"], np.array([1, 0]))
    np.testing.assert_array_equal(values, [[0.0, np.nan], [1.0, np.nan]])
    assert place.values([], np.array([0])).shape == (1, 0)


def test_label_info_is_read(tmp_path):
    text = '[labels.a]\nkind = "disease"\nweak = true\norgans = ["brain"]\n[labels.b]\nkind = "volume"\n'
    (tmp_path / "cohort.toml").write_text(text)
    assert read_label_info(tmp_path) == {"a": LabelInfo("disease", True, ("brain",)), "b": LabelInfo("volume")}


@pytest.mark.parametrize("text", [None, "[", "[labels]\na = 3", '[labels.a]\nkind = "colour"'])
def test_a_broken_cohort_file_is_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / "cohort.toml").write_text(text)
    with pytest.raises(DataError, match=r"cohort.toml") as caught:
        read_label_info(tmp_path)
    assert "\n" not in str(caught.value)


def test_labels_are_aligned_to_the_images(tmp_path):
    for seed, name in enumerate(("p", "q")):
        volume = np.random.default_rng(seed).random((4, 4, 4)).astype(np.float32)
        nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / f"{name}.nii.gz")
    (tmp_path / "site.toml").write_text('name = "s"\nlabels = "labels.csv"\n')
    (tmp_path / "manifest.csv").write_text("subject,stream,path\nq,brain-mr,q.nii.gz\np,brain-mr,p.nii.gz\n")
    (tmp_path / "labels.csv").write_text("subject,a,b\nx,5,5\np,1,\n")
    stream = StreamConfig(shape=(4, 4, 4), patch=(2, 2, 2), spacing_mm=(1.0, 1.0, 1.0))
    place = LabelledStore.open(tmp_path, {"brain-mr": stream})
    assert place.store.subjects == ("q", "p")
    np.testing.assert_array_equal(place.values(["a", "b"], np.array([0, 1])), [[np.nan, np.nan], [1.0, np.nan]])
    (tmp_path / "site.toml").write_text('name = "s"\n')
    assert LabelledStore.open(tmp_path, {"brain-mr": stream}).labels == {}
