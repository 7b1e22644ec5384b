"""Grouped mean: each group of parameters is averaged over the sites that trained it, by how much they trained it.

Flower's FedAvg wants the same keys and one weight from everyone. Here each site receives and returns its own subset of
groups, with a weight per group; replies are taken one by one and let go, and their order does not matter to the bit.
A group that nobody trained keeps its bytes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from panfm.config import RunConfig
from panfm.errors import ProtocolError
from panfm.sharing.coding import bytes_per_group, decode
from panfm.sharing.groups import Flat, GroupManifest
from panfm.sharing.mean import ExactMean
from panfm.sharing.messages import Handshake, RoundReply
from panfm.sharing.weights import Weights, weight_limits, weight_segments
from strategies.guards import check_reply
from strategies.records import unpack


@dataclass
class RoundOutcome:
    """What came of a round's replies."""

    accepted: dict[str, RoundReply] = field(default_factory=dict)
    """Site -> its reply, without the updates."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Site -> why its reply was refused."""
    bytes_up: dict[str, int] = field(default_factory=dict)
    """Group -> bytes of updates as they came, refused ones included."""


class GroupedMean(Strategy):
    """Mean of updates per group; site -> groups and greatest weights come from the handshakes."""

    def __init__(self, run: RunConfig, manifest: GroupManifest, roster: Mapping[int, Handshake]) -> None:
        """A strategy for one run.

        Args:
            run: Its description.
            manifest: Layout of the groups.
            roster: Node id -> handshake of the sites that take part.
        """
        self.run = run
        self.manifest = manifest
        self.roster = roster
        self.outcome = RoundOutcome()
        self._limits = {node_id: self._weight_limits(handshake) for node_id, handshake in roster.items()}
        self._global = ArrayRecord()
        self._run_id = ""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per site, with the groups it trains; all share the same arrays."""
        self._global = arrays
        self._run_id = str(config["run-id"])
        for node_id, handshake in self.roster.items():
            groups = ArrayRecord({group: arrays[group] for group in handshake.group_hashes})
            yield Message(
                RecordDict({"arrays": groups, "config": config}),
                node_id,
                MessageType.TRAIN,
                ttl=self.run.federation.round_timeout_s,
                group_id=str(server_round),
            )

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """New global arrays from the good replies; what happened stands in `outcome`."""
        self.outcome = RoundOutcome()
        means = {group: self._empty_mean(group) for group in self.manifest.groups}
        for message in replies:
            self._take(message, means, server_round)
        return ArrayRecord({group: self._moved(group, means[group].mean()) for group in means}), self._metrics()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: a site's validation loss comes with its training reply."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Nothing."""

    def summary(self) -> None:
        """Nothing: the run folder tells."""

    def _take(self, message: Message, means: Mapping[str, ExactMean], server_round: int) -> None:
        handshake = self.roster[message.metadata.src_node_id]
        try:
            reply = self._read(message, handshake)
            limits = self._limits[message.metadata.src_node_id]
            check_reply(reply, handshake, means, limits, of=(self._run_id, server_round))
        except ProtocolError as error:
            self.outcome.rejected[handshake.site] = str(error)
            return
        for group, update in reply.updates.items():
            means[group].add(update, reply.weights[group])
        self.outcome.accepted[handshake.site] = replace(reply, updates={})

    def _read(self, message: Message, handshake: Handshake) -> RoundReply:
        if handshake.site in self.outcome.accepted:
            raise ProtocolError("second reply to one question")
        reply = RoundReply.from_records(unpack(message.content))
        for group, size in bytes_per_group(reply.updates).items():
            self.outcome.bytes_up[group] = self.outcome.bytes_up.get(group, 0) + size
        return replace(reply, updates=decode(self.run.sharing.coding, self.manifest, reply.updates))

    def _weight_limits(self, handshake: Handshake) -> dict[str, Weights]:
        return {
            group: weight_limits(
                self.run, self.manifest, group, subjects=handshake.subjects, subjects_per_stream=handshake.streams
            )
            for group in handshake.group_hashes
        }

    def _empty_mean(self, group: str) -> ExactMean:
        limit = sum(max(limits[group], default=0.0) for limits in self._limits.values() if group in limits)
        return ExactMean(weight_segments(self.run, self.manifest, group), weight_limit=limit or 1.0)

    def _moved(self, group: str, mean: Flat | None) -> Array:
        if mean is None:
            return self._global[group]
        return Array(self._global[group].numpy() + mean)

    def _metrics(self) -> MetricRecord:
        return MetricRecord({"num-accepted": len(self.outcome.accepted), "num-rejected": len(self.outcome.rejected)})
