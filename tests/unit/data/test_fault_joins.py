"""Kind 7: joins without accounting, and subjects compared as bytes."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from panfm.data.joins import Join
from panfm.data.labels import Labels, read_label_table
from panfm.data.subjects import subject_key
from panfm.errors import DataError
from panfm.evaluate.embed import Features
from panfm.evaluate.probe_features import probe_features
from panfm.evaluate.probe_labels import LabelledStore
from tests.unit.data.conftest import STREAM

SAME = {
    "leading zeros": ("7", "007"),
    "leading zeros within": ("sub-07-1", "SUB-7-01"),
    "case": ("Müller", "MÜLLER"),
    "sharp s": ("Strauß", "STRAUSS"),
    "Unicode forms": ("Jos\u00e9", "Jose\u0301"),
    "zero width": ("a1", "a\u200b1\ufeff"),
    "joiners and marks without width": ("a1", "a\u2060\u034f1\ufe0f"),
    "soft hyphen": ("north1", "nor\u00adth1"),
    "full width": ("a12", "\uff21\uff11\uff12"),
    "spaces": ("a 1", "  a\u00a0 1 "),
    "right to left": ("a1", "\u200fa1"),
}
OTHER = [("7", "70"), ("0", "00a"), ("a1", "a11"), ("e", "\u00e9"), ("s-1", "s1"), ("100", "1"), ("1.10", "1.1")]


@pytest.mark.parametrize("name", SAME)
def test_one_subject(name):
    first, second = SAME[name]
    assert subject_key(first) == subject_key(second)


@pytest.mark.parametrize(("first", "second"), OTHER)
def test_two_subjects(first, second):
    assert subject_key(first) != subject_key(second)


@given(st.text(max_size=12))
def test_a_key_is_a_fixed_point_under_every_form(text):
    key = subject_key(text)
    assert subject_key(key) == key
    for form in ("NFC", "NFD", "NFKC"):
        assert subject_key(unicodedata.normalize(form, text)) == key


@pytest.mark.parametrize("name", SAME)
def test_two_spellings_in_one_table_are_refused(site, tmp_path, name):
    first, second = SAME[name]
    site.row(first, path="x.nii.gz")
    site.row(second, "heart-mr", path="y.nii.gz")
    lines = site.check().output.splitlines()
    assert any("manifest.csv:3: found subject" in line and "which line 2 spells" in line for line in lines) == (
        first.strip() != second.strip()
    )
    (tmp_path / "labels.csv").write_text(f"subject,age\n{first},1\n{second},2\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"labels\.csv:3: found subject .* again, expected one row per subject"):
        read_label_table(tmp_path / "labels.csv")


@pytest.mark.parametrize("name", SAME)
def test_labels_find_their_images_by_any_spelling(site, name):
    first, second = SAME[name]
    site.nifti("x.nii.gz", np.arange(64, dtype=np.int16).reshape(4, 4, 4))
    site.row(first, path="x.nii.gz")
    (site.folder / "labels.csv").write_text(f"subject,age\n{second},61.5\nnobody,3\n", encoding="utf-8")
    place = LabelledStore.open(site.folder, {"brain-mr": STREAM})
    assert place.labels["age"].tolist() == [61.5]
    assert "labels.csv: 1 subject used for the images of clinic" in site.check().output


def test_the_check_tells_both_sides_by_name(site):
    for subject in ("007", "b", "c"):
        site.add(subject)
    (site.folder / "labels.csv").write_text("subject,age\n7,1\nb,2\nx,3\ny,4\n")
    told = [line for line in site.check().output.splitlines() if "labels.csv" in line or "the images of" in line]
    assert told == [
        "note: labels.csv: 2 subjects used for the images of clinic",
        "note: labels.csv: spelled otherwise than in the images of clinic: '7' for '007'",
        "note: the images of clinic: 1 subject not in labels.csv: 'c'",
        "note: labels.csv: 2 subjects not in the images of clinic: 'x', 'y'",
    ]


def test_an_account_names_a_few():
    assert Join.of("abcdefgh", "h").lines("images", "labels")[-1] == (
        "images: 7 subjects not in labels: 'a', 'b', 'c', 'd', 'e' and 2 more"
    )


def features(names, split, seed):
    values = np.random.default_rng(seed).normal(size=(len(names), 3)).astype(np.float32)
    shape = (len(names), 1)
    return Features(tuple(names), (split,) * len(names), ("brain-mr",), np.ones(shape, bool), values, "cls", "hash")


def labels(names, table, column=0):
    return Labels(tuple(names), ("sick",), (table.features[:, [column]] > 0).astype(float))


NUMBERS = [str(number) for number in range(1, 31)]
PADDED = [f"{number:03}" for number in range(1, 31)]


def test_features_and_labels_are_joined_by_key_and_accounted_for():
    fit, test = features([f"a{number}" for number in NUMBERS], "train", 0), features(NUMBERS, "test", 1)
    own = labels([f"A{number}" for number in PADDED], fit), labels([*PADDED[:-1], "x"], test)
    [score, *_], notes = probe_features([fit, test], own, bootstrap=0)
    assert score.value > 0.95
    assert notes[0] == "labels: 59 subjects used for features"
    assert notes[1].startswith("labels: spelled otherwise than in features: 'A001' for 'a1', ")
    assert notes[2:] == ["features: 1 subject not in labels: '30'", "labels: 1 subject not in features: 'x'"]


def test_two_places_may_number_their_subjects_alike():
    fit, test = features(NUMBERS, "train", 0), features(PADDED, "test", 1)
    [score, *_], notes = probe_features([fit, test], [labels(NUMBERS, fit), labels(NUMBERS, test)], bootstrap=0)
    assert score.value > 0.95
    assert [note for note in notes if "used" in note] == [
        f"labels {place}: 30 subjects used for features {place}" for place in (1, 2)
    ]


def test_a_subject_twice_is_refused():
    fit, test = features(NUMBERS, "train", 0), features(PADDED, "test", 1)
    with pytest.raises(
        DataError, match="subject '001' stands in two feature files, expected one, or a label table for"
    ):
        probe_features([fit, test], [labels(NUMBERS, fit)])
    with pytest.raises(DataError, match="subject '01' stands twice in one file"):
        probe_features([features([*NUMBERS, "01"], "train", 0)], [labels(NUMBERS, fit)])
    with pytest.raises(DataError, match="subject '1' stands in two tables, expected one"):
        probe_features([fit], [labels(NUMBERS, fit), labels(NUMBERS, fit)])
