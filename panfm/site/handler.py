"""Answers a question to a site: a frame comes in, and a frame always goes out, if only with an error.

Only three questions are known, and each has a limit on time and memory. An error goes out as one scrubbed line under
the site's public name; its whole story stays in the site's log.

Of an error at a site the server may learn the kind, and nothing that was written at the site. A ProtocolError is about
the server's own message, so its text passes. A LimitError has a public text, which passes; its full text may count
patients or measure images. Any other error may quote paths, keys of the site's own description, or subjects: only its
kind passes.
"""

import errno
import logging
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from panfm.config.site_description import LimitsConfig
from panfm.errors import BudgetError, ConfigError, DataError, LedgerError, LimitError, PanfmError, ProtocolError
from panfm.sharing.frames import Frame, Kind
from panfm.sharing.messages import Invitation, RoundTask
from panfm.site.site import Site

_AGAIN_S = 1.0
"""An alarm that some library swallowed is raised again after this long."""
_MAX_LENGTH = 200
_INSTEAD = {
    BudgetError: "this site's privacy budget does not cover another round",
    LedgerError: "this site's privacy ledger does not hold",
    ConfigError: "this site's own description does not hold",
    DataError: "this site's data or private state is faulty",
    LimitError: "this goes beyond what this site allows",
}
logger = logging.getLogger(__name__)


def answer(site: Site, question: Frame) -> Frame:
    """Answer a question.

    Guarantees:
        always: there is an answer, and it says nothing of an error but what `scrub` lets pass.
    """
    site.asked_run = site.asked_round = None
    try:
        site.refresh()
        limits = site.config.limits
        with time_limit(limits.seconds_per_round), memory_errors_explained(limits):
            match question.kind:
                case Kind.HANDSHAKE:
                    records = site.handshake(Invitation.from_records(question.records)).to_records()
                case Kind.ROUND:
                    records = site.train_round(RoundTask.from_records(question.records)).to_records()
                case Kind.SUMS:
                    records = site.give_sums(question.records)
                case kind:
                    _refuse(kind)
        site.check_unchanged()
        return Frame(Kind.ANSWER, records)
    except (Exception, SystemExit) as error:
        logger.exception("%s: answered with an error", question.kind)
        site.summed, site.is_repeat = None, False  # sums and replies stay
        site.log_error(error)
        return Frame.error(f"site {site.config.name}: {scrub(error)}")


def _refuse(kind: Kind) -> NoReturn:
    raise ProtocolError(f"{kind}: not a question, expected {Kind.HANDSHAKE}, {Kind.ROUND} or {Kind.SUMS}")


def scrub(error: BaseException) -> str:
    """Turn an error into one line for the server.

    Guarantees:
        no path, no data: of an error that is no ProtocolError and declares no public text, nothing passes but its kind.
    """
    kind = type(error).__name__
    public = str(error) if isinstance(error, ProtocolError) else error.public if isinstance(error, LimitError) else None
    if public or isinstance(error, ProtocolError):
        return f"{kind}: {' '.join((public or '').split())}"[:_MAX_LENGTH]
    if not isinstance(error, PanfmError):
        return f"internal error ({kind})"
    return f"{kind}: {_INSTEAD.get(type(error), 'this site cannot go on')}; its log tells more"


@contextmanager
def memory_errors_explained(limits: LimitsConfig) -> Iterator[None]:
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
    """Limit the memory of this process: a round that asks for more fails, and the process stays."""
    if gib is not None:
        size = int(gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
