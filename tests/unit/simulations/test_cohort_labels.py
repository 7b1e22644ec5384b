import numpy as np
import pytest

from panfm.errors import ConfigError
from panfm.evaluate.probe_labels import LabelInfo, Unmatched
from simulations.cohorts.cohort_labels import read_cohort_labels


@pytest.fixture
def cohort(tmp_path):
    for place, text in {
        "sites/a": "subject,sex,grade,age\nx,M,i,50\ny,F,ii,61.5\n",
        "sites/b": "subject,sex,grade,age\nz,F,iii,70\nu,M,ii,48\n",
        "holdout": "subject,sex,grade,age\nv,,i,20\nw,M,iii,\n",
    }.items():
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / "site.toml").write_text(f'name = "{folder.name}"\nlabels = "labels.csv"\n')
        (folder / "labels.csv").write_text(text)
    return tmp_path


def test_labels_need_no_description(cohort):
    labels = read_cohort_labels(cohort)
    assert labels.info == {
        "sex": LabelInfo("class"),
        "grade=i": LabelInfo("class"),
        "grade=ii": LabelInfo("class"),
        "grade=iii": LabelInfo("class"),
        "age": LabelInfo("volume"),
    }
    assert [note.partition(":")[0] for note in labels.notes] == ["sex", "grade"]


def test_cohort_toml_has_the_first_word(cohort):
    (cohort / "cohort.toml").write_text('[labels.age]\nkind = "volume"\nweak = true\n')
    labels = read_cohort_labels(cohort)
    assert (labels.info, labels.kinds) == ({"age": LabelInfo("volume", weak=True)}, None)


def test_labels_toml_of_one_place_holds_for_all(cohort):
    (cohort / "sites" / "b" / "labels.toml").write_text('[grade]\nkind = "ignore"\n[sex]\nyes = "f"\n')
    labels = read_cohort_labels(cohort)
    assert list(labels.info) == ["sex", "age"]
    assert labels.kinds["sex"].values == ("m", "f")
    (cohort / "holdout" / "labels.toml").write_text('[sex]\nyes = "m"\n')
    with pytest.raises(ConfigError, match=r"holdout/labels.toml: sex: differs from another place's"):
        read_cohort_labels(cohort)


def test_subjects_on_one_side_only():
    assert Unmatched.of(("a", "b"), ("b", "c")) == Unmatched(("a",), ("c",))
    assert Unmatched.of((), ()) == Unmatched()


def test_labels_of_the_probe_are_aligned_to_the_images(cohort, write_site):
    from panfm.config import StreamConfig
    from panfm.evaluate.probe_labels import LabelledStore

    folder = write_site(cohort / "sites" / "c", "c", ("brain",), 2, extra='labels = "labels.csv"')
    (folder / "labels.csv").write_text("subject,sex\nc-1,M\nother,F\n")
    stream = StreamConfig(shape=(8, 8, 8), patch=(4, 4, 4), spacing_mm=(8.0, 8.0, 8.0))
    place = LabelledStore.open(folder, {"brain-mr": stream}, read_cohort_labels(cohort).kinds)
    np.testing.assert_array_equal(place.labels["sex"], [np.nan, 1])
    assert np.isnan(place.labels["age"]).all()
    assert (place.name, place.unmatched) == ("c", Unmatched(("c-0",), ("other",)))
