import numpy as np
import pytest

from panfm.config import SiteConfig
from panfm.data.labels import read_labels
from panfm.errors import DataError

SITE = SiteConfig(name="clinic", labels="labels.csv")


def read(folder, text):
    (folder / "labels.csv").write_text(text)
    return read_labels(folder, SITE)


def test_empty_is_unknown(tmp_path):
    labels = read(tmp_path, "age,subject,asthma\n61.5,b,1\n,a,\n")
    assert labels.subjects == ("b", "a")
    assert labels.names == ("age", "asthma")
    np.testing.assert_array_equal(labels.values, [[61.5, 1], [np.nan, np.nan]])


def test_no_subjects_and_no_labels(tmp_path):
    assert read(tmp_path, "subject,age\n").values.shape == (0, 1)
    assert read(tmp_path, "subject\na\n").values.shape == (1, 0)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("age\n1\n", "labels.csv: no column subject"),
        ("subject,age\na,old\n", "labels.csv:2: age: found 'old', expected a number or nothing"),
        ("subject,age\na,inf\n", "labels.csv:2: age: found 'inf', expected a finite number or nothing"),
        ("subject,age\na,1\na,2\n", "labels.csv:3: found subject 'a' again"),
        ("subject,age\n,1\n", "labels.csv:2: found no subject"),
        ("subject,age,age\na,1,2\n", "labels.csv: column 'age' twice"),
        ("subject,age\na,1,2\n", "labels.csv: 3 cells on line 2 under 2 columns"),
    ],
)
def test_faults(tmp_path, text, complaint):
    with pytest.raises(DataError) as caught:
        read(tmp_path, text)
    assert complaint in str(caught.value)


def test_absent(tmp_path):
    with pytest.raises(DataError, match="names no label table"):
        read_labels(tmp_path, SiteConfig(name="clinic"))
    with pytest.raises(DataError, match=r"labels\.csv: no such file"):
        read_labels(tmp_path, SITE)
