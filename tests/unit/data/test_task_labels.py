"""The labels of a run's task at a site: who trains, what is refused, and what a private run says of it."""

from dataclasses import replace

import numpy as np
import pytest

from panfm.config import SiteConfig
from panfm.config.task import TaskConfig
from panfm.data.task_labels import UNLABELLED, open_training_store, read_task_labels, with_task_labels
from panfm.errors import LimitError
from tests.unit.config.test_task_config import OLD, PRIVATE

SITE = SiteConfig(name="alpha", labels="labels.csv")
AGE = '[task]\nlabel = "age"\nkind = "number"\ncentre = 50.0\nscale = 10.0\n'
KIND = '[task]\nlabel = "kind"\nkind = "classes"\nclasses = ["benign", "Malignant", "0"]\n'


@pytest.fixture
def labelled(make_run, make_store, tmp_path):
    """Writes a label table for s0, s1, ... and returns the store of six patients, the last for validation."""

    def make(cells, task=OLD, column="old", **more):
        run = make_run(task)
        store = replace(make_store(run, 6), splits=("train",) * 5 + ("val",))
        lines = [f"S{number},{cell}" for number, cell in enumerate(cells)]
        (tmp_path / "labels.csv").write_text("\n".join([f"subject,{column}", *lines]) + "\n")
        return with_task_labels(store, tmp_path, SITE, run, **more)

    return make


def test_patients_without_a_label_do_not_train(labelled, caplog):
    store = labelled(["1", "0", "", "1.0", "n/a", "0"])
    np.testing.assert_array_equal(store.labels[:, 0], np.float32([1, 0, np.nan, 1, np.nan, 0]))
    assert store.splits == ("train", "train", UNLABELLED, "train", UNLABELLED, "val")
    assert "2 of 5 training patients of site alpha have no old: they do not train" in caplog.text
    np.testing.assert_array_equal(store.batch([3, 2]).labels[:, 0], np.float32([1, np.nan]))
    assert labelled(["1", "0", "1"]).splits == ("train",) * 3 + (UNLABELLED,) * 3


def test_classes_and_numbers_in_the_units_of_the_loss(labelled):
    kinds = labelled(["malignant", "BENIGN", "0.0", "", "benign", "0"], KIND, "kind")
    np.testing.assert_array_equal(kinds.labels[:3], np.float32([[0, 1, 0], [1, 0, 0], [0, 0, 1]]))
    ages = labelled(["50", "70", "45.0", "", "-5e1", "0"], AGE, "age")
    np.testing.assert_allclose(ages.labels[[0, 1, 2, 4, 5], 0], [0.0, 2.0, -0.5, -10.0, -5.0])


@pytest.mark.parametrize(
    ("task", "column", "cell", "expected"),
    [
        (OLD, "old", "2", "found '2', expected 0, 1, or nothing"),
        (KIND, "kind", "normal", "found 'normal', expected benign, Malignant, 0, or nothing"),
        (AGE, "age", "old", "a number within 1e+06 scales of 50"),
        (AGE, "age", "inf", "a number within"),
        (AGE, "age", "1e300", "a number within"),
    ],
)
def test_other_values_are_refused_and_in_a_private_run_unknown(labelled, task, column, cell, expected):
    """The server hears no value; in a private run it must not even hear that there is one."""
    known = {"age": "40", "old": "1", "kind": "benign"}[column]
    with pytest.raises(LimitError) as caught:
        labelled([known, cell], task, column)
    assert f"labels.csv:3: {column}: " in str(caught.value)
    assert expected in str(caught.value)
    assert caught.value.public == f"task.label: {column}: this site has other values than the run's"
    private = labelled([known, cell], task + PRIVATE, column)
    assert private.splits[:2] == ("train", UNLABELLED)
    assert np.isnan(private.labels[1]).all()


def test_an_absent_label_has_a_named_reason(labelled, tmp_path, make_run, make_store):
    with pytest.raises(LimitError, match=r"task\.label: old: no column of this site's label table") as caught:
        labelled(["1"], OLD, "young")
    assert caught.value.public == str(caught.value)
    with pytest.raises(LimitError, match="known of too few training patients"):
        labelled(["", "", "", "", "", "1"])
    with pytest.raises(LimitError, match="this site has no label table"):
        read_task_labels(tmp_path, SiteConfig(name="alpha"), TaskConfig(label="old", kind="yes-no"))


def test_labels_toml_names_unknown_cells_and_another_kind_is_refused(labelled, tmp_path):
    (tmp_path / "labels.toml").write_text('[old]\nunknown = ["9"]\n')
    assert labelled(["1", "9", "0", "1", "0", "0"]).splits[1] == UNLABELLED
    (tmp_path / "labels.toml").write_text('[old]\nkind = "ignore"\n')
    with pytest.raises(LimitError, match=r"labels\.toml reads this column as ignore, the run as yes-no"):
        labelled(["1", "0"])


def test_a_site_alone_trains_on_the_patients_of_the_federation(labelled, make_run, tmp_path, monkeypatch):
    """In a private run the floor is 1, as at a site in the federation (`Floors.of`)."""
    store = labelled(["1", "0", "0", "0", "0", "1"])
    (tmp_path / "site.toml").write_text('name = "alpha"\nlabels = "labels.csv"\n[limits]\nsmallest-batch = 2\n')
    opened = replace(store, splits=("train",) * 5 + ("val",))
    monkeypatch.setattr("panfm.data.task_labels.open_store", lambda *_: opened)
    for extra, split in (("", UNLABELLED), (PRIVATE, "train")):
        assert open_training_store(tmp_path, make_run(OLD + extra)).splits[0] == split


def test_a_class_of_too_few_patients_does_not_train(labelled):
    """One positive of five training patients: its class's part of the update would be that patient's."""
    store = labelled(["1", "0", "0", "0", "0", "1"], smallest_class=2)
    assert store.splits == (UNLABELLED, "train", "train", "train", "train", UNLABELLED)
    assert labelled(["1", "1", "0", "0", "0", "1"], smallest_class=2).splits[0] == "train"
    with pytest.raises(LimitError, match="known of too few"):
        labelled(["1", "1", "0", "0", "0", "1"], smallest_class=4)
