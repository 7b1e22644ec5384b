"""Asks a site's resident worker: one connection per question, over the site's local socket. Light: no torch."""

import socket
import time
from collections.abc import Callable
from pathlib import Path

from panfm.sharing.frames import Frame, address, encode, receive, send

ATTEMPTS = 3
"""A worker that went away while it worked is asked again, and gives the same answer; but not for ever."""
START_S = 120.0
"""A worker that is being started again has this long."""
_POLL_S = 0.5


def ask(path: str, question: Frame, on_lost: Callable[[], object] = lambda: None) -> Frame:
    """Send a question to the worker and wait for its answer; a round takes as long as it takes.

    Args:
        on_lost: Called when the worker is not there, or goes away before it has answered.
    Raises:
        ProtocolError: the question cannot travel, or the answer is none.
        OSError: there is no worker, or it went away again and again.
    """
    content, attempts = encode(question), 0
    while True:
        attempts += 1
        try:
            with _connect(path, on_lost) as connection:
                send(connection, content, timeout_s=None)
                return receive(connection, timeout_s=None)
        except ConnectionError:
            on_lost()
            if attempts == ATTEMPTS:
                raise


def _connect(path: str, on_lost: Callable[[], object]) -> socket.socket:
    """Connect to the worker's socket. Raises TimeoutError if no worker comes in time."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        connection = socket.socket(socket.AF_UNIX)
        try:
            with address(Path(path)) as short:
                connection.connect(short)
        except (ConnectionRefusedError, FileNotFoundError):
            connection.close()
            on_lost()
            time.sleep(_POLL_S)
        else:
            return connection
    raise TimeoutError(f"no worker at {path} for {START_S:g} s")
