"""The way to a site's resident worker: one connection per question, over the site's local socket. Light: no torch."""

import socket
import time
from pathlib import Path

from panfm.sharing.frames import Frame, address, encode, receive, send

ATTEMPTS = 3
"""A worker that went away while it worked is asked again, and gives the same answer; but not for ever."""
START_S = 120.0
"""A worker that is being started again has this long."""
_POLL_S = 0.5


def ask(path: str, question: Frame) -> Frame:
    """What the worker answers; a round takes as long as it takes.

    Raises:
        ProtocolError: the question cannot travel, or the answer is none.
        OSError: there is no worker, or it went away again and again.
    """
    return _ask(path, encode(question), ATTEMPTS)


def _ask(path: str, content: bytes, attempts: int) -> Frame:
    try:
        with _connect(path) as connection:
            send(connection, content, timeout_s=None)
            return receive(connection, timeout_s=None)
    except ConnectionError:
        if attempts == 1:
            raise
        return _ask(path, content, attempts - 1)


def _connect(path: str) -> socket.socket:
    """Raises TimeoutError if no worker comes in time."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        connection = socket.socket(socket.AF_UNIX)
        try:
            with address(Path(path)) as short:
                connection.connect(short)
        except (ConnectionRefusedError, FileNotFoundError):
            connection.close()
            time.sleep(_POLL_S)
        else:
            return connection
    raise TimeoutError(f"no worker at {path} for {START_S:g} s")
