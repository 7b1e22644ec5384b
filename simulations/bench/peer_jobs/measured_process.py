"""Runs a command and tells its CPU seconds, its seconds on the clock and its peak memory, with all its descendants.

Processes that a framework leaves behind come to this one, are ended and counted (Linux: a child subreaper). All of them
are looked at five times a second: memory is the largest sum of their proportional set sizes; CPU seconds are those that
the system has summed up or, where a framework does not wait for its processes (Ray), the sum of what each was last seen
to have used, whichever is more.
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
_PAUSE_S = 0.2
_GRACE_S = 20.0


def main(out: str, *command: str) -> None:
    """Run the command; write what it took, and its status."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    begin, over, seen = time.perf_counter(), threading.Event(), Seen()
    process = subprocess.Popen(command)
    watcher = threading.Thread(target=_watch, args=(over, seen))
    watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - begin
    over.set()
    watcher.join()
    _end_rest()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = max(used.ru_utime + used.ru_stime, sum(seen.cpu_seconds.values()))
    taken = {"cpu_seconds": cpu_seconds, "seconds": seconds, "peak_mib": seen.peak_kib / 1024}
    Path(out).write_text(json.dumps(taken | {"status": status}), encoding="utf-8")


class Seen:
    """What was seen of the processes."""

    def __init__(self) -> None:
        self.peak_kib = 0
        self.cpu_seconds: dict[tuple[int, str], float] = {}
        """(process, its start) -> CPU seconds, without its children."""

    def look(self) -> None:
        """Look at all processes once."""
        pids = _descendants()
        self.peak_kib = max(self.peak_kib, sum(map(_proportional_kib, pids)))
        for pid in pids:
            if fields := _stat(pid):
                ticks = int(fields[11]) + int(fields[12])
                self.cpu_seconds[pid, fields[19]] = ticks / os.sysconf("SC_CLK_TCK")


def _watch(over: threading.Event, seen: Seen) -> None:
    while not over.wait(_PAUSE_S):
        seen.look()


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if fields := _stat(pid := int(folder.name)):
            children.setdefault(int(fields[1]), []).append(pid)
    listed, new = [], [os.getpid()]
    while new:
        new = [child for parent in new for child in children.get(parent, [])]
        listed += new
    return listed


def _stat(pid: int) -> list[str]:
    """Fields of a process after its name, from its state on; none where it has ended."""
    return _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()


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
