"""What a site grants a run at most: which experiments, how large, how long, how much memory."""

import errno
import math
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from panfm.config import RunConfig, experiment_hash
from panfm.config.site import LimitsConfig
from panfm.config.start import start_hash
from panfm.errors import LimitError
from panfm.models.sizes import num_parameters, state_bytes, step_bytes, tokens_per_patient
from panfm.site.state import KEPT

_AGAIN_S = 1.0
"""An alarm that some library swallowed is raised again after this long."""


def check_experiment(run: RunConfig, limits: LimitsConfig) -> None:
    """Raises LimitError if the site has named the experiments that it runs and this is none of them."""
    found = experiment_hash(run)
    if limits.experiments and found not in limits.experiments:
        raise LimitError.of_question(f"experiment {found} is not in this site's limits.experiments")


def check_start_known(run: RunConfig, limits: LimitsConfig) -> None:
    """Raises LimitError if a run starts from parameters that the site has not named.

    The server chooses such parameters, so that round 1 may be made to answer to one patient. A site without floors does
    not mind, and one whose own epsilon bounds the noise need not.
    """
    if run.start is None or limits.smallest_batch == 1 or (run.privacy is not None and limits.epsilon is not None):
        return
    start = start_hash(run.start)
    if experiment_hash(run) not in limits.experiments and start not in limits.starts:
        raise LimitError.of_question(
            f"[start]: parameters that this site has not named; its operator may add {start} to limits.starts"
        )


def check_sizes(run: RunConfig, limits: LimitsConfig) -> None:
    """Refuse a run that is too large, before anything is built or allocated for it.

    Raises:
        LimitError: names the limit, its value, and the run's value.
    """
    image = max(stream.channels * math.prod(stream.shape) for stream in run.streams.values())
    _check("parameters", num_parameters(run), limits.parameters)
    _check("voxels-per-image", image, limits.voxels_per_image)
    _check("tokens-per-patient", tokens_per_patient(run), limits.tokens_per_patient)
    _check("local-steps", run.train.local_steps, limits.local_steps)
    _check("rounds", run.train.rounds, limits.rounds)
    _check("step-gib", step_bytes(run) / 2**30, limits.step_gib)
    _check("state-gib", kept_bytes(run) / 2**30, limits.state_gib)


def kept_bytes(run: RunConfig) -> int:
    """Bytes of a run's private states on disk, at most: those kept, and the one that is written."""
    return (KEPT + 1) * state_bytes(run)


def check_public_cache(run: RunConfig, limits: LimitsConfig) -> None:
    """Raises LimitError if the prepared images of the site's public number of patients would have no room.

    Of a private run at a site with such a number, this refuses before anything of the true number is looked at.
    """
    if run.privacy is None or limits.public_subjects is None:
        return
    numbers = sum(stream.channels * math.prod(stream.shape) for stream in run.streams.values())
    size = 4 * numbers * limits.public_subjects / 2**30
    if size > limits.cache_gib:
        raise LimitError.of_question(
            f"images of public-subjects with every stream would fill {size:.6g} GiB, this site's limits.cache-gib is "
            f"{limits.cache_gib:g}"
        )


def _check(name: str, found: float, limit: float) -> None:
    """Of a number that the run's description alone decides."""
    if found > limit:
        raise LimitError.of_question(f"this run asks for {found:.12g}, this site's limits.{name} is {limit:.12g}")


@contextmanager
def memory_told(limits: LimitsConfig) -> Iterator[None]:
    """Raises LimitError out of its block where memory ran out, whoever met it."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not _is_of_memory(error):
            raise
        limit = f"limits.memory-gib is {limits.memory_gib:g}" if limits.memory_gib else "the machine has no more"
        raise LimitError.of_question(f"this run asks for more memory than there is: {limit}") from error


def _is_of_memory(error: Exception) -> bool:
    """NumPy and Python raise MemoryError, the system ENOMEM, and torch a RuntimeError that says so."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_torch = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or is_torch


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises LimitError out of its block when the time is up; without effect outside a process's main thread.

    Alarms reach the main thread only. The worker of a hospital answers there; simulations may call from another.

    Guarantees:
        LimitError: also if what the alarm stopped made another error of it, or went on and came to an end.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    limit = LimitError.of_question(f"took longer than this site's limits.seconds-per-round ({seconds:g})")
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
