"""Signs of a site's health: its last error, the pace of a run, free disk, the end of the certificate authority."""

import itertools
import shutil
import statistics
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from panfm import certificates
from panfm.config import SiteConfig, site_path
from panfm.errors import DataError, one_line
from panfm.hash_chain import Entry

_RECENT = 6
"""Rounds whose median distance in time is the pace of a run."""
_TAIL = 1 << 17
"""Bytes at the end of `site.log` that hold its last error."""
_GIB = 2**30


def last_error(state_dir: Path) -> str | None:
    """Time and last line of the newest error in `site.log`; None if there is none."""
    try:
        with (state_dir / "site.log").open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - _TAIL))
            text = log.read().decode(errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"site.log cannot be read ({error.strerror})"
    lines = text.rstrip().splitlines()
    begin = max((number for number, line in enumerate(lines) if _is_time(line)), default=0)
    told = next((number for number in range(len(lines) - 1, begin, -1) if lines[number][:1].strip()), begin)
    return one_line(f"{lines[begin]} {lines[told]}" if told > begin else lines[begin]) if lines else None


def next_round(lines: Sequence[Entry], run_id: str) -> str | None:
    """When a run will ask for its next round, by the median distance of its last ones; None before the second.

    Args:
        lines: Of the audit log.
    """
    last, pace = pace_of(lines, run_id)
    if last is None or pace is None:
        return None
    return (last + timedelta(seconds=pace)).astimezone().isoformat(sep=" ", timespec="minutes")


def pace_of(lines: Sequence[Entry], run_id: str) -> tuple[datetime | None, float | None]:
    """When the last round of a run was answered, and the median distance of its last rounds in seconds; None where it
    cannot be told.

    Args:
        lines: Of the audit log.
    """
    answered = {line["round"]: line["time"] for line in lines if line.get("run") == run_id and line["kind"] == "answer"}
    times = [datetime.fromisoformat(text) for text in list(answered.values())[-_RECENT:]]
    distances = [(later - earlier).total_seconds() for earlier, later in itertools.pairwise(times)]
    return times[-1] if times else None, statistics.median(distances) if distances else None


def free_space(folder: Path) -> str:
    """Free and whole size of the disk that a folder lies on, or will."""
    usage = shutil.disk_usage(_existing(folder))
    return f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB"


def free_bytes(folder: Path) -> int:
    """Free bytes of that disk."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def certificate_end(folder: Path, site: SiteConfig) -> str:
    """When the coordinator's certificate authority ends, as far as this account can read it."""
    path = site_path(folder, site.coordinator.root_certificates)
    try:
        end = certificates.certificate_end(path)
    except DataError as error:
        return f"not known here ({error})"
    days = (end - time.time()) / 86_400
    return f"ends {time.strftime('%Y-%m-%d', time.localtime(end))}, in {days:.0f} days"


def _is_time(line: str) -> bool:
    try:
        datetime.fromisoformat(line)
    except ValueError:
        return False
    return True
