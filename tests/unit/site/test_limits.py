import contextlib
import signal
import subprocess
import sys
import time

import pytest

from panfm.config import experiment_hash, parse_run, parse_site
from panfm.errors import LimitError
from panfm.site.admission import check_experiment, check_sizes
from panfm.site.handler import memory_errors_explained, time_limit

RUN = 'name = "small"\n[streams]\nbrain-mr = { shape = [8, 8, 8], patch = [4, 4, 8], spacing-mm = [8.0, 8.0, 8.0] }\n'
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


def test_experiments_are_known_by_what_sites_are_told_of_them():
    run, other = parse_run(RUN), parse_run(RUN + "[train]\nrounds = 9\n")
    simulated = parse_run(RUN + '[cohort]\nkind = "folder"\npath = "/tmp"\n')
    assert experiment_hash(simulated) == experiment_hash(run) != experiment_hash(other)
    limits = parse_site(f'name = "a"\n[limits]\nexperiments = ["{experiment_hash(run)}"]\n').limits
    check_experiment(run, limits)
    check_experiment(simulated, limits)
    with pytest.raises(LimitError, match=experiment_hash(other)):
        check_experiment(other, limits)
    check_experiment(other, parse_site('name = "a"').limits)


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


def test_sizes_at_the_limit_and_beyond():
    limits = parse_site(
        'name = "alpha"\n[limits]\nvoxels-per-image = 512\ntokens-per-patient = 4\nrounds = 10\n'
    ).limits
    run = parse_run(RUN)
    check_sizes(run, limits)
    for name, found in (("voxels-per-image", 512), ("tokens-per-patient", 4), ("rounds", 10), ("local-steps", 20)):
        less = limits.model_copy(update={name.replace("-", "_"): found - 1})
        with pytest.raises(LimitError, match=rf"asks for {found}, this site's limits\.{name} is {found - 1}$"):
            check_sizes(run, less)
