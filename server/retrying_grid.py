"""A Grid that outlives its SuperLink: calls are tried again while the SuperLink is down.

Flower's own client tries a call again when no connection can be made. It gives up on an answer of 500, which a
SuperLink gives while it ends, and on a TLS connection that is cut off. (Read in Flower 1.41, supercore/retry.)
A run that Flower has ended meanwhile is told so by a signal, which ends this process.
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import httpx
from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo  # the type that Grid.get_nodes names
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from panfm.errors import RunError

R = TypeVar("R")
logger = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 20.0
_SERVER_ERRORS = 500


class ReplyLostError(RunError):
    """A call failed while a reply was on its way: Flower gives a reply once."""


class RetryingGrid(Grid):
    """Another Grid, whose calls are tried again while its SuperLink is down."""

    def __init__(self, grid: Grid, wait_s: float) -> None:
        """Args: wait_s: How long a call is tried again, at most."""
        self._grid = grid
        self._wait_s = wait_s

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes that are online."""
        return self._retry(self._grid.get_node_ids)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes that are online."""
        return self._retry(self._grid.get_nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages. Raises what the Grid raises once the SuperLink is back: Flower cannot send the same message
        twice, so whoever sent it sends another."""
        try:
            return self._grid.push_messages(messages)
        except httpx.HTTPError:
            self.get_node_ids()
            raise

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have come. Raises ReplyLostError, once the SuperLink is back, if the call failed."""
        try:
            return self._grid.pull_messages(message_ids)
        except httpx.HTTPError as error:
            self.get_node_ids()
            raise ReplyLostError(f"the SuperLink went away ({type(error).__name__})") from error

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, then pull until all have answered or the time is over."""
        return self._grid.send_and_receive(messages, timeout=timeout)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a `Message`."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run."""
        return self._grid.run

    def _retry(self, call: Callable[[], R]) -> R:
        start, pause = time.monotonic(), _FIRST_PAUSE_S
        while True:
            try:
                return call()
            except httpx.HTTPError as error:
                if not _can_heal(error) or time.monotonic() - start + pause > self._wait_s:
                    raise
                logger.warning("the SuperLink does not answer (%s), trying again in %g s", type(error).__name__, pause)
                time.sleep(pause)
                pause = min(2.0 * pause, _LONGEST_PAUSE_S)


def _can_heal(error: httpx.HTTPError) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= _SERVER_ERRORS
    return isinstance(error, httpx.TransportError)
