"""What `panfm site watchdog` does: starts a SuperNode anew that may hold a reply of the worker that nobody fetches.

After an outage a SuperNode can be online and still send each reply only when the next message arrives
(docs/upstream-report.md). Nothing on this machine tells that a reply was fetched, but a run that goes on asks again:

    a run is not finished, its worker answered, and since then nothing was asked for longer than
    patience + 3 x the median distance of the run's last rounds

The SuperNode is then started anew, once for each reply: not if it was started after that reply.
"""

import shutil
import subprocess
import time
from collections.abc import Collection, Sequence

from panfm.cli.site_health import pace_of
from panfm.errors import RunError, one_line
from panfm.hash_chain import Entry

_PACES = 3.0


def reply_that_waits(
    lines: Sequence[Entry], runs: Collection[str], now: float, patience_s: float
) -> tuple[Entry, float] | None:
    """Find the last answer to a run that is not finished, if the next question is overdue; with its time.

    Args:
        lines: Of the audit log.
        runs: Ids of the runs that are not finished.
        now: In seconds since the epoch.
    """
    if not lines or lines[-1].get("run") not in runs or lines[-1]["kind"] != "answer":
        return None
    last, pace = pace_of(lines, lines[-1]["run"])
    is_overdue = last is not None and now - last.timestamp() > patience_s + _PACES * (pace or 0.0)
    return (lines[-1], last.timestamp()) if last is not None and is_overdue else None


def started_at(unit: str) -> float:
    """When systemd has started a unit, in seconds since the epoch. Raises RunError if it cannot tell."""
    words = [_systemctl(), "show", unit, "--property=ActiveState,ActiveEnterTimestamp", "--timestamp=unix"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    told = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    since = told.get("ActiveEnterTimestamp", "")
    if done.returncode or told.get("ActiveState") != "active" or not since.startswith("@"):
        state = told.get("ActiveState") or one_line(done.stderr, 100)
        raise RunError(f"{unit}: {state}, expected a unit of systemd that is active")
    return float(since.removeprefix("@"))


def restart(unit: str) -> None:
    """Start a unit of systemd anew. Raises RunError if that fails."""
    done = subprocess.run([_systemctl(), "restart", unit], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{unit}: not started anew ({one_line(done.stderr, 200)})")


def watch_once(
    lines: Sequence[Entry], runs: Collection[str], unit: str, patience_s: float, now: float | None = None
) -> str:
    """Start the SuperNode anew if a reply may wait in it; returns what was done, in one line. Raises RunError as
    `restart`."""
    waiting = reply_that_waits(lines, runs, time.time() if now is None else now, patience_s)
    if waiting is None:
        return "no reply waits"
    line, since = waiting
    words = f"round {line['round']} of {line['run']} was answered at {line['time']}, and nothing was asked since"
    if started_at(unit) > since:
        return f"{words}; {unit} was started after that, so it is left alone"
    restart(unit)
    return f"{words}: {unit} was started anew"


def _systemctl() -> str:
    if (path := shutil.which("systemctl")) is None:
        raise RunError("systemctl: not found, expected a machine with systemd")
    return path
