import pytest
from hypothesis import given
from hypothesis import strategies as st

from panfm.errors import ConfigError, DataError, LimitError, ProtocolError, RunError
from panfm.site.handler import scrub

OWN = "ConfigError: this site's own description does not hold; its log tells more"
DATA = "DataError: this site's data or private state is faulty; its log tells more"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ProtocolError("round 9: expected 1 to 3"), "ProtocolError: round 9: expected 1 to 3"),
        (ProtocolError("first line\nsecond line"), "ProtocolError: first line second line"),
        (ProtocolError(""), "ProtocolError: "),
        (LimitError.of_question("took longer than"), "LimitError: took longer than"),
        (LimitError("7 subjects", public="too few\nsubjects"), "LimitError: too few subjects"),
        (LimitError("7 subjects"), "LimitError: this goes beyond what this site allows; its log tells more"),
        (ConfigError("/srv/St Mary's Oncology/site.toml: patient-john-doe-1961: unknown key"), OWN),
        (DataError("subject NHS-1234567: NaN voxels"), DATA),
        (RunError("at /srv/data"), "RunError: this site cannot go on; its log tells more"),
        (ValueError("/srv/data/NHS-1234567.nii.gz"), "internal error (ValueError)"),
        (SystemExit("/srv/data"), "internal error (SystemExit)"),
    ],
)
def test_by_hand(error, line):
    assert scrub(error) == line


@given(st.text(), st.sampled_from([ConfigError, DataError, LimitError, RunError, RuntimeError, OSError]))
def test_nothing_of_the_text_passes(text, kind):
    assert scrub(kind(text)) == scrub(kind("x"))


@given(st.text(max_size=400))
def test_one_short_line(text):
    line = scrub(ProtocolError(text))
    assert "\n" not in line
    assert len(line) <= 200
