"""Looks after a run while its server is at work, on a thread: status page, disk, certificates.

Once a minute, and at each event, it writes `status.html` anew, so that a page which is older tells of a server that is
gone. It notes in the history when the run folder's disk is nearly full, when a certificate ends soon, and when a site
has spent most of its planned epsilon.
"""

import logging
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from panfm.certificates import certificate_end
from panfm.config import RunConfig
from panfm.errors import PanfmError
from panfm.report.run_events import EventKind
from panfm.report.status_page import WRITTEN_EVERY_S
from server.events import EventLog
from server.tracking import refresh_page

logger = logging.getLogger(__name__)
DISK_LOW_SHARE = 0.05
"""Of the disk that is free."""
DISK_LOW_BYTES = 5 * 2**30
"""With more free bytes than this a large disk is not low, whatever the share."""
BUDGET_SHARE = 0.8
CERTIFICATE_DAYS = 30
_DAY_S = 86_400
_STOP_S = 30.0


@contextmanager
def watched(folder: Path, events: EventLog, certificates: Sequence[Path] = ()) -> Iterator[None]:
    """Look after a run until the block ends.

    Args:
        folder: The run folder.
        certificates: Files whose end is watched.
    """
    wake, stopped = threading.Event(), threading.Event()
    events.on_event.append(wake.set)

    def look() -> None:
        while not stopped.is_set():
            refresh_page(folder)
            note_disk(folder, events)
            note_certificates(certificates, events)
            wake.wait(WRITTEN_EVERY_S)
            wake.clear()

    thread = threading.Thread(target=look, name="run-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        events.on_event.remove(wake.set)
        stopped.set()
        wake.set()
        thread.join(_STOP_S)


def note_disk(folder: Path, events: EventLog) -> None:
    """Note when the disk of a folder is nearly full, and when it has room again."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        logger.warning("%s: free space is not known (%s)", folder, error.strerror)
        return
    is_low = usage.free < min(DISK_LOW_SHARE * usage.total, DISK_LOW_BYTES)
    words = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB are free on the run folder's disk"
    events.note_level(EventKind.DISK, "low" if is_low else None, words, of="run folder")


def note_certificates(paths: Sequence[Path], events: EventLog) -> None:
    """Note when a certificate ends within 30 days, cannot be read, or was renewed."""
    for path in paths:
        try:
            end = certificate_end(path)
        except PanfmError as error:
            events.note_level(EventKind.CERTIFICATE, "not known", str(error), of=path.name)
            continue
        days = (end - time.time()) / _DAY_S
        level = None if days > CERTIFICATE_DAYS else "ends soon" if days > 0 else "has ended"
        day = time.strftime("%Y-%m-%d", time.localtime(end))
        events.note_level(EventKind.CERTIFICATE, level, f"{path.name} ends {day}, in {days:.0f} days", of=path.name)


def note_budget(run: RunConfig, epsilon: Mapping[str, Any], events: EventLog) -> None:
    """Note when 80 % of a site's planned epsilon is spent.

    Args:
        epsilon: Site -> planned cost of its rounds so far, as in a line of rounds.jsonl.
    """
    if run.patient_dp is None:
        return
    for site, spent in epsilon.items():
        if spent is not None and spent >= BUDGET_SHARE * run.patient_dp.epsilon:
            words = f"has spent {spent:.3g} of its planned epsilon {run.patient_dp.epsilon:g}"
            events.note_level(EventKind.BUDGET, f"{BUDGET_SHARE:.0%}", words, of="plan", site=site)
