import pytest
from hypothesis import given
from hypothesis import strategies as st

from panfm.errors import ConfigError, DataError, ProtocolError
from panfm.site import scrub


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ProtocolError("round 9: expected 1 to 3"), "ProtocolError: round 9: expected 1 to 3"),
        (ConfigError("/srv/data/site.toml: name: missing"), "ConfigError: name: missing"),
        (ConfigError("labels: no file 'patients of ward 3.csv'"), "ConfigError: labels: no file ..."),
        (ProtocolError("first line\nsecond line"), "ProtocolError: first line"),
        (ProtocolError(""), "ProtocolError: "),
        (DataError("subject NHS-1234567: NaN voxels"), "DataError"),
        (ValueError("/srv/data/NHS-1234567.nii.gz"), "internal error (ValueError)"),
        (SystemExit("/srv/data"), "internal error (SystemExit)"),
    ],
)
def test_by_hand(error, line):
    assert scrub(error) == line


@given(st.text(max_size=400), st.sampled_from([ConfigError, DataError, ProtocolError, RuntimeError, OSError]))
def test_no_path(text, kind):
    line = scrub(kind(text + " /srv/data/patient.nii.gz"))
    assert "/" not in line
    assert "\\" not in line
    assert "patient.nii" not in line
    assert "\n" not in line
    assert len(line) <= 200


@given(st.text(min_size=30))
def test_no_data(text):
    assert scrub(DataError(text)) == "DataError"
    assert scrub(RuntimeError(text)) == "internal error (RuntimeError)"
