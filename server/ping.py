"""Pings: a short message to sites from which nothing came lately, before they are asked to train.

A SuperNode can be online and not at work: it waits for good for a reply that never came, or pushes its replies only
when the next message arrives (seen in Flower 1.41 after an outage). The ClientApp answers a ping by itself, so a site
that does not answer one in time would hold up a round until its deadline.
"""

import time
from collections.abc import Iterable

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from server.exchange import Exchange

PING = f"{MessageType.QUERY}.ping"


class Pings:
    """Remembers when each node was heard of last, and pings those that have been quiet."""

    def __init__(self, grid: Grid, timeout_s: float, heard: Iterable[int]) -> None:
        """Begin with nodes that have just been heard of.

        Args:
            timeout_s: A node that was quiet for so long is pinged, and has as long to answer. 0: none is.
        """
        self.timeout_s = timeout_s
        self._grid = grid
        self._heard = dict.fromkeys(heard, time.monotonic())

    def note_heard(self, exchange: Exchange) -> None:
        """Note the nodes that answered an exchange, if only with an error of their own."""
        for node_id in exchange.seconds.keys() - (exchange.failed.keys() - exchange.errors):
            at = exchange.start + exchange.seconds[node_id]
            self._heard[node_id] = max(at, self._heard.get(node_id, at))

    def unanswered(self, nodes: Iterable[int]) -> dict[int, str]:
        """Ping the nodes that have been quiet; return node id -> why it has not answered."""
        since = time.monotonic() - self.timeout_s
        quiet = [node_id for node_id in nodes if self._heard.get(node_id, since) <= since]
        if not self.timeout_s or not quiet:
            return {}
        messages = (Message(RecordDict(), node_id, PING, ttl=self.timeout_s, group_id="ping") for node_id in quiet)
        exchange = Exchange(self._grid, messages, self.timeout_s)
        for _ in exchange:
            pass
        self.note_heard(exchange)
        return {node_id: reason for node_id, reason in exchange.failed.items() if node_id not in exchange.errors}
