"""Limits on time and memory of an answer, and the one line that the server learns of an error."""

import contextlib
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from panfm.config import parse_site
from panfm.errors import ConfigError, DataError, LimitError, ProtocolError, RunError
from panfm.site.handler import memory_errors_explained, scrub, time_limit

OWN = "ConfigError: this site's own description does not hold; its log tells more"
DATA = "DataError: this site's data or private state is faulty; its log tells more"
LONG_S = 60.0
"""Nobody waits for it, unless the alarm fails."""


def _swallow_the_first() -> None:
    with contextlib.suppress(LimitError):
        time.sleep(LONG_S)
    time.sleep(LONG_S)


def test_the_alarm_ends_what_takes_too_long_even_what_swallows_it_once():
    start = time.monotonic()
    with pytest.raises(LimitError, match=r"limits\.seconds-per-round \(0\.05\)"), time_limit(0.05):
        _swallow_the_first()
    assert time.monotonic() - start < LONG_S


def _make_another_error_of_it() -> None:
    try:
        time.sleep(LONG_S)
    except LimitError as error:
        raise RuntimeError("an import failed") from error


def _come_to_an_end() -> None:
    with contextlib.suppress(LimitError):
        time.sleep(LONG_S)


@pytest.mark.parametrize("block", [_make_another_error_of_it, _come_to_an_end])
def test_whatever_a_block_makes_of_the_alarm_is_told_as_the_limit(block):
    with pytest.raises(LimitError, match="seconds-per-round"), time_limit(0.05):
        block()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_errors_of_the_block_itself_stay_what_they_are():
    with pytest.raises(RuntimeError, match="its own"), time_limit(60.0):
        raise RuntimeError("its own")


def test_no_alarm_stays_behind():
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(60.0):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == before
    with time_limit(None):
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.slow
def test_memory_is_limited_and_the_process_stays():
    code = (
        "from panfm.site.handler import limit_memory; limit_memory(0.25)\n"
        "try: bytearray(2**29)\n"
        "except MemoryError: print('refused', len(bytearray(2**24)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused", str(2**24)]


def test_only_memory_is_told_as_memory():
    limits = parse_site('name = "alpha"').limits
    for error in (RuntimeError("its own"), OSError(2, "No such file"), ValueError("its own")):
        with pytest.raises(type(error)), memory_errors_explained(limits):
            raise error
    with pytest.raises(LimitError, match="the machine has no more"), memory_errors_explained(limits):
        raise MemoryError


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
def test_scrubbed_by_hand(error, line):
    assert scrub(error) == line


@given(st.text(), st.sampled_from([ConfigError, DataError, LimitError, RunError, RuntimeError, OSError]))
def test_no_word_of_an_error_passes(text, kind):
    assert scrub(kind(text)) == scrub(kind("x"))


@given(st.text(max_size=400))
def test_a_scrubbed_error_is_one_short_line(text):
    line = scrub(ProtocolError(text))
    assert "\n" not in line
    assert len(line) <= 200
