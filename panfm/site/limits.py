"""What a site grants a run at most: which experiments, how long, how much memory."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from panfm.config import RunConfig, experiment_hash
from panfm.config.site import LimitsConfig
from panfm.errors import LimitError

_AGAIN_S = 1.0
"""An alarm that some library swallowed is raised again after this long."""


def check_experiment(run: RunConfig, limits: LimitsConfig) -> None:
    """Raises LimitError if the site has named the experiments that it runs and this is none of them."""
    found = experiment_hash(run)
    if limits.experiments and found not in limits.experiments:
        raise LimitError(f"experiment {found} is not in this site's limits.experiments")


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises LimitError out of its block when the time is up. In the main thread of a process only.

    Guarantees:
        LimitError: also if what the alarm stopped made another error of it, or went on and came to an end.
    """
    if seconds is None:
        yield
        return
    limit = LimitError(f"took longer than this site's limits.seconds-per-round ({seconds:g})")
    is_up = False

    def stop(*_: object) -> None:
        nonlocal is_up
        is_up = True
        raise limit

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
        yield
    except Exception as error:
        if is_up and error is not limit:
            raise limit from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if is_up:
        raise limit


def limit_memory(gib: float | None) -> None:
    """From now on this process cannot fill more memory: a round that asks for more fails, the process stays."""
    if gib is not None:
        size = int(gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
