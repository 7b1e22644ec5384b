"""Runs a command and tells its CPU seconds, its seconds on the clock and its peak memory, with all its descendants.

Processes that a framework leaves behind come to this one, are ended and counted (Linux: a child subreaper). Memory is
the largest sum of their proportional set sizes, looked at twice a second.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

_SUBREAPER = 36
_PAUSE_S = 0.5
_GRACE_S = 20.0


def main(out: str, *command: str) -> None:
    """Run the command; write what it took, and its status."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    begin, over, peaks = time.perf_counter(), threading.Event(), [0]
    process = subprocess.Popen(command)
    watcher = threading.Thread(target=_watch, args=(over, peaks))
    watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - begin
    over.set()
    watcher.join()
    _end_rest()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = {"cpu_seconds": used.ru_utime + used.ru_stime, "seconds": seconds, "peak_mib": max(peaks) / 1024}
    Path(out).write_text(json.dumps(taken | {"status": status}), encoding="utf-8")


def _watch(over: threading.Event, peaks: list[int]) -> None:
    while not over.wait(_PAUSE_S):
        peaks.append(sum(map(_proportional_kib, _descendants())))


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        if fields := _read(stat).rpartition(")")[2].split():
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    listed, new = [], [os.getpid()]
    while new:
        new = [child for parent in new for child in children.get(parent, [])]
        listed += new
    return listed


def _proportional_kib(pid: int) -> int:
    lines = _read(Path(f"/proc/{pid}/smaps_rollup")).splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


def _end_rest() -> None:
    """Wait for what is left; end it where it stays."""
    last = time.monotonic() + _GRACE_S
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if not pid:
                if time.monotonic() > last:
                    for left in _descendants():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(left, signal.SIGKILL)
                time.sleep(0.2)


if __name__ == "__main__":
    main(*sys.argv[1:])
