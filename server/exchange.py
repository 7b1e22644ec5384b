"""Exchange: messages to many sites, replies as they arrive until a deadline, and why the others failed."""

import logging
import time
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from panfm.errors import one_line

logger = logging.getLogger(__name__)
_PUSHES = 3
_MAX_PAUSE_S = 2.0
_PAUSE_SHARE = 0.05
"""Between looks we wait this share of the time already waited: at most 5 % late, few requests."""


class Exchange:
    """Messages to nodes, one each; iterate over it for the good replies, then read `failed` and `seconds`.

    Replies are fetched one at a time, so that only one is in memory. A failure is put down to the node that was asked
    (Flower's own error replies name another), by the id of the message.
    """

    def __init__(self, grid: Grid, messages: Iterable[Message], timeout_s: float) -> None:
        self.failed: dict[int, str] = {}
        """Node id -> why there is no good reply."""
        self.seconds: dict[int, float] = {}
        """Node id -> seconds until its reply."""
        self.late: set[int] = set()
        """Node ids without a reply at the deadline."""
        self._grid = grid
        self._timeout_s = timeout_s
        self._start = time.monotonic()
        self._waiting: dict[str, int] = {}
        for message in messages:
            self._push(message)

    @property
    def is_waiting(self) -> bool:
        """Whether a reply may still come in time."""
        return bool(self._waiting) and self._elapsed() < self._timeout_s

    @property
    def waiting_for(self) -> set[int]:
        """Node ids without a reply so far."""
        return set(self._waiting.values())

    def __iter__(self) -> Iterator[Message]:
        while self.is_waiting:
            before = len(self._waiting)
            yield from self.ready()
            if self._waiting and len(self._waiting) == before:
                time.sleep(min(_MAX_PAUSE_S, 0.01 + _PAUSE_SHARE * self._elapsed()))
        self.late = self.waiting_for
        self.failed |= dict.fromkeys(self.late, f"no reply within {self._timeout_s:g} s")

    def ready(self) -> Iterator[Message]:
        """Yield the good replies that have arrived by now."""
        for message_id in list(self._waiting):
            for reply in self._grid.pull_messages([message_id]):
                node_id = self._waiting.pop(message_id)
                self.seconds[node_id] = self._elapsed()
                if reply.has_error():
                    self.failed[node_id] = one_line(reply.error.reason or f"error {reply.error.code}")
                else:
                    yield reply

    def _push(self, message: Message) -> None:
        """One at a time: arrays that an earlier message carried are not sent again.

        A SuperLink that died after it had taken an array, and before it could say so, refuses the array when Flower
        sends it once more. The question is then asked anew; a site that gets it twice gives the same answer twice.
        """
        node_id = message.metadata.dst_node_id
        for attempt in range(1, _PUSHES + 1):
            try:
                message_id = next(iter(self._grid.push_messages([message])), None)
            except Exception:
                if attempt == _PUSHES:
                    raise
                logger.warning("node %s: sending failed, trying again", node_id, exc_info=True)
                message = _copy(message)
            else:
                break
        if message_id:
            self._waiting[message_id] = node_id
        else:
            self.failed[node_id] = "the message could not be sent"

    def _elapsed(self) -> float:
        return time.monotonic() - self._start


def _copy(message: Message) -> Message:
    """Same message under another id."""
    about = message.metadata
    return Message(message.content, about.dst_node_id, about.message_type, ttl=about.ttl, group_id=about.group_id)
