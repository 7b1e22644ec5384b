"""The split into training, validation and test; each mistake in labels or masks is one line, before training."""

import nibabel
import numpy as np
import pytest

from panfm.config import load_run
from panfm.errors import ConfigError, DataError
from panfm.finetune.task_data import draw_patients, read_task_data


@pytest.fixture
def read(make_run, write_run, labelled_site, settings_of):
    run = write_run(make_run())

    def of(site, task="labels.csv:bright", **changes):
        return read_task_data(settings_of(run, site, task, **changes), load_run(run / "model" / "run.toml"))

    return of


def test_visits_are_examples_and_patients_are_parted(read, labelled_site):
    data = read(labelled_site())
    assert (data.task.kind, data.task.outputs) == ("yes-no", ("bright",))
    assert data.num_patients() == {"train": 6, "validation": 3, "test": 3}
    assert data.patients(data.train).count("clinic-0") == 2
    assert data.notes == ()


def test_who_is_not_split_is_drawn_by_patient(read, labelled_site):
    site = labelled_site(splits=False)
    data, again, other = read(site), read(site), read(site, seed=1)
    assert data.num_patients() == {"train": 7, "validation": 2, "test": 3}
    assert "no patient in the split test: 3 of 12 drawn" in data.notes[0]
    people = [set(data.patients(part)) for part in (data.train, data.validation, data.test)]
    assert sum(map(len, people)) == len(set.union(*people)) == 12
    assert data.test.tolist() == again.test.tolist() != other.test.tolist()


def test_few_labels(read, labelled_site):
    data = read(labelled_site(), patients=4)
    assert data.num_patients() == {"train": 3, "validation": 1, "test": 3}
    classes = {float(data.targets[index, 0]) for index in data.train}
    assert classes == {0.0, 1.0}
    with pytest.raises(DataError, match="--patients: found 40, expected at most 6"):
        read(labelled_site("other"), patients=40)
    with pytest.raises(DataError, match=r"^--patients 2: found 1 patients to train on, all with the same bright"):
        read(labelled_site("third"), patients=2)


def test_draws_begin_with_one_of_each_class():
    pool = [f"p{number}" for number in range(20)]
    classes = {name: int(name == "p13") for name in pool}
    assert all("p13" in draw_patients(pool, classes, 2, seed=seed, purpose="x") for seed in range(5))


def test_draws_keep_the_shares_of_classes():
    pool = [f"p{number:02}" for number in range(40)]
    classes = {name: "rare" if number < 4 else "common" for number, name in enumerate(pool)}
    for seed in range(5):
        drawn = [classes[one] for one in draw_patients(pool, classes, 30, seed=seed, purpose="x")]
        assert (len(drawn), drawn.count("rare")) == (30, 3)
    two = {name: "rare" if number < 2 else "common" for number, name in enumerate(pool)}
    assert [two[one] for one in draw_patients(pool, two, 38, seed=0, purpose="x")].count("rare") == 1
    nobody = dict.fromkeys(pool)
    assert len(set(draw_patients(pool, nobody, 7, seed=0, purpose="x"))) == 7
    assert sorted(draw_patients(pool, classes, 40, seed=0, purpose="x")) == pool


def relabel(site, **yes_or_no):
    rows = ["subject,bright"]
    rows += [f"{subject.replace('_', '-')},{label}" for subject, label in yes_or_no.items()]
    (site / "labels.csv").write_text("\n".join(rows) + "\n")


def test_one_class_alone(read, labelled_site):
    site = labelled_site()
    relabel(site, clinic_0="no", clinic_1="no", clinic_2="yes", clinic_3="no", clinic_6="no")
    with pytest.raises(DataError, match="2 patients to train on, all with the same bright, expected patients of two"):
        read(site)
    relabel(site, clinic_0="no", clinic_1="yes", clinic_2="yes", clinic_3="no", clinic_6="no")
    assert "bright: the same for all 1 test patients" in read(site).notes


def test_an_image_of_two_sites_is_refused(read, labelled_site):
    one, two = labelled_site("one"), labelled_site("two", 8)
    (two / "two-1-only.nii.gz").write_bytes((one / "one-5-only.nii.gz").read_bytes())
    (two / "two-1-only-seg.nii.gz").write_bytes((one / "one-5-only-seg.nii.gz").read_bytes())
    for task in ("labels.csv:bright", "segmentation"):
        with pytest.raises(DataError, match=r"the same brain-mr image for subject 'two-1' and for 'one-5' of .*/one,"):
            read(one, task, data=(str(one), str(two)))


def test_kinds_of_labels(read, labelled_site):
    site = labelled_site()
    assert read(site, "labels.csv:grade").task.outputs == ("grade=high", "grade=low", "grade=mid")
    assert read(site, "labels.csv:size").task.kind == "number"


def test_sites_are_pooled(read, labelled_site, settings_of):
    one, two = labelled_site("one"), labelled_site("two", 8)
    data = read(one, data=(str(one), str(two)))
    assert data.num_patients() == {"train": 10, "validation": 5, "test": 5}
    assert len(data.store.images["brain-mr"]) == len(data.store.subjects) == 22
    with pytest.raises(DataError, match="expected each patient in one --data"):
        read(one, data=(str(one), str(one) + "/."))


def test_masks_of_the_site(read, labelled_site):
    data = read(labelled_site(), "segmentation")
    assert (data.task.values, data.task.stream) == ((0, 7), "brain-mr")
    assert data.targets.shape == (13, 8, 8, 4)
    assert set(np.unique(data.targets)) == {0, 1}


def test_mistakes_are_told_in_one_line(read, labelled_site):
    site = labelled_site()
    for task, kind, told in [
        ("labels.csv:age", DataError, "found no column 'age', expected one of bright, size, grade"),
        ("absent.csv:age", DataError, "no such file"),
        ("labels.csv", ConfigError, "expected labels.csv:COLUMN, or segmentation"),
    ]:
        with pytest.raises(kind, match=told) as caught:
            read(site, task)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="--streams: found 'leg-mr'"):
        read(site, streams=("leg-mr",))
    with pytest.raises(ConfigError, match="--stream: found 'heart-ct', expected a stream with masks: brain-mr"):
        read(site, "segmentation", masked_stream="heart-ct")


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (np.full((9, 8, 6), 0.5, np.float32), "seg.nii.gz: found a mask that holds 0.5, expected whole numbers"),
        (np.zeros((9, 8, 5), np.uint8), "a mask of shape 9x8x5, expected 9x8x6"),
        (np.arange(432, dtype=np.int16).reshape(9, 8, 6), "more than 64 classes"),
    ],
)
def test_a_faulty_mask_is_named(read, labelled_site, mask, told):
    site = labelled_site()
    nibabel.save(nibabel.Nifti1Image(mask, np.diag([2.0, 2, 2, 1])), site / "clinic-5-only-seg.nii.gz")
    with pytest.raises(DataError, match=told):
        read(site, "segmentation")


def test_a_site_without_masks(read, labelled_site):
    site = labelled_site()
    rows = (site / "manifest.csv").read_text().splitlines()
    (site / "manifest.csv").write_text("\n".join(",".join(row.split(",")[:4]) for row in rows) + "\n")
    with pytest.raises((ConfigError, DataError)):
        read(site, "segmentation")


def write_mask(site, stem, mask):
    nibabel.save(nibabel.Nifti1Image(mask.astype(np.uint8), np.diag([2.0, 2, 2, 1])), site / f"{stem}-only-seg.nii.gz")


def test_numbers_of_masks_that_differ_are_told(read, labelled_site):
    one, two = labelled_site("one", 8), labelled_site("two", 8)
    mask = np.zeros((9, 8, 6))
    mask[2:6, 2:6, 1:5] = 9
    write_mask(two, "two-3", mask)
    notes = read(one, "segmentation", data=(str(one), str(two))).notes
    assert notes[0].startswith(f"masks hold different class numbers ({one}: 7; {two}: 7, 9)")
    assert notes[1] == "class 9: in no training mask, cannot be learned"


def test_a_number_that_float32_cannot_hold_is_refused(read, labelled_site):
    site = labelled_site()
    lines = (site / "labels.csv").read_text().splitlines()
    lines[2] = "clinic-1,yes,1e300,mid"
    (site / "labels.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="size: found a number beyond float32"):
        read(site, "labels.csv:size")


def test_who_is_left_out_is_counted(read, labelled_site):
    site = labelled_site()
    rows = (site / "manifest.csv").read_text().replace("clinic-5-only-seg.nii.gz", "")
    (site / "manifest.csv").write_text(rows)
    assert read(site, "segmentation").notes == ("brain-mr: 1 images without a mask are left out",)
    with (site / "labels.csv").open("a") as table:
        table.write("somebody,yes,3.5,low\n")
    assert read(site).notes == ("bright: 1 labelled patients without an image are left out",)
