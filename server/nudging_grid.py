"""A Grid that pings a node which owes a reply, so that a SuperNode which holds the reply back sends it.

A SuperNode that could not confirm a message, for instance of a run that was stopped just then, sends each later reply
only when the next message arrives, until it is started again (Flower 1.41 and 1.42, docs/upstream-report.md). Without
another message its site would let every deadline pass. A node that still works on its answer takes no other message
meanwhile: its pings expire at the SuperLink.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

import httpx
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from server.ping import PING
from server.retrying_grid import RetryingGrid

logger = logging.getLogger(__name__)
_FIRST_S, _SHARE = 10.0, 0.1
"""Seconds until the first ping, and between pings at least; else this share of the time that the node has taken."""


@dataclass
class _Owed:
    """A reply that has not come."""

    node_id: int
    since: float
    next_ping: float


class NudgingGrid(RetryingGrid):
    """A RetryingGrid that pings the nodes whose replies are asked for and have not come."""

    def __init__(self, grid: Grid, wait_s: float) -> None:
        """Args: wait_s: As of RetryingGrid."""
        super().__init__(grid, wait_s)
        self._owed: dict[str, _Owed] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, and note from whom a reply is owed."""
        messages = list(messages)
        message_ids = list(super().push_messages(messages))
        now = time.monotonic()
        for message_id, message in zip(message_ids, messages, strict=True):
            if message_id:
                self._owed[message_id] = _Owed(message.metadata.dst_node_id, now, now + _FIRST_S)
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Fetch the replies that have come; ping the nodes of the others when it is time."""
        message_ids = list(message_ids)
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            self._owed.pop(reply.metadata.reply_to_message_id, None)
        now = time.monotonic()
        for owed in (self._owed[message_id] for message_id in message_ids if message_id in self._owed):
            if now >= owed.next_ping:
                owed.next_ping = now + max(_FIRST_S, _SHARE * (now - owed.since))
                self._ping(owed)
        return replies

    def _ping(self, owed: _Owed) -> None:
        """Send a ping whose reply nobody waits for; one that cannot be sent is left out."""
        ping = Message(RecordDict(), owed.node_id, PING, ttl=_FIRST_S, group_id="nudge")
        try:
            list(self._grid.push_messages([ping]))
        except httpx.HTTPError as error:
            logger.warning("node %s: a ping could not be sent (%s)", owed.node_id, type(error).__name__)
