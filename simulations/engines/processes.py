"""Processes of ours: each in a group of its own, so that it ends with all its children; free ports; waits."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from panfm.errors import RunError

Process = subprocess.Popen[bytes]
_END_S = 10.0
_POLL_S = 0.2


def start(words: Sequence[str], log: Path, environment: Mapping[str, str]) -> Process:
    """Start a command in the background; what it prints goes to the end of a file."""
    with log.open("ab") as file:
        return subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def end(process: Process) -> None:
    """Ask a process and its children to stop, then make them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        send_signal(process, number)


def send_signal(process: Process, number: signal.Signals) -> None:
    """Send a signal to a process and its children, and give it a while to end."""
    try:
        os.killpg(process.pid, number)
        process.wait(timeout=_END_S)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        return


def wait_until(condition: Callable[[], bool], awaited: str, timeout_s: float, *processes: Process) -> None:
    """Raises RunError if it takes too long, or if one of the processes it depends on has ended."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        ended = [process.returncode for process in processes if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            why = f"ended with status {ended[0]}" if ended else f"not within {timeout_s:g} s"
            raise RunError(f"{awaited}: {why}; its log in the run folder tells more")
        time.sleep(_POLL_S)


def is_healthy(address: str, certificates: Path | None = None) -> bool:
    """Whether a SuperLink answers at an address, over TLS where certificates are given."""
    try:
        context = ssl.create_default_context(cafile=certificates) if certificates else None
        with urllib.request.urlopen(f"{'https' if context else 'http'}://{address}/health", timeout=1, context=context):
            return True
    except (urllib.error.URLError, OSError):
        return False


def free_ports(number: int) -> list[int]:
    """Ports that nobody uses, and that Linux gives to nobody else while this process lives.

    Each is held by a socket that does not listen, so that a server may, as long as it sets SO_REUSEADDR. Elsewhere than
    on Linux a held port would be refused to the server too.
    """
    ports = []
    for _ in range(number):
        holder = socket.socket()
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        ports.append(holder.getsockname()[1])
        if sys.platform == "linux":
            holder.detach()
        else:
            holder.close()
    return ports
