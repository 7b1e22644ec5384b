"""Grouped mean: each group of parameters is averaged over the sites that trained it, by how much they trained it.

Flower's FedAvg wants the same keys and one weight from everyone. Here each site receives and returns its own subset of
groups, with a weight per group; replies are taken one by one and let go, and their order does not matter to the bit.
A group that nobody trained keeps its bytes.

What it needs from earlier rounds (usual norms and directions, state of the server optimisers, last coded step) is in
`memory`.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from panfm.config import RunConfig
from panfm.errors import ProtocolError, one_line
from panfm.sharing.coding import bytes_per_group, decode
from panfm.sharing.downlink import code_step, take_step
from panfm.sharing.groups import Flat, GroupManifest, stream_of
from panfm.sharing.mean import Votes
from panfm.sharing.messages import Handshake, RoundReply
from panfm.sharing.npy import NpySpace
from panfm.sharing.shares import FEWEST, capped_shares
from panfm.sharing.weights import Weights, check_gate_mass, is_pooled, weight_limits
from strategies.direction import LIMIT, Directions, PointsElsewhereError
from strategies.downlink import Downlink
from strategies.guards import check_reply
from strategies.means import GroupMean, empty_mean, largest_share
from strategies.memory import Memory
from strategies.norms import NormBounds, remember
from strategies.optimisers import server_step
from strategies.participation import draw_sites
from strategies.records import hand_over, unpack, view_array
from strategies.teacher import follow

logger = logging.getLogger(__name__)


@dataclass
class RoundOutcome:
    """What came of a round's replies."""

    accepted: dict[str, RoundReply] = field(default_factory=dict)
    """Site -> its reply, without the updates."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Site -> why its reply was refused."""
    bytes_up: dict[str, int] = field(default_factory=dict)
    """Group -> bytes of updates as they came, refused ones included."""
    norms: dict[str, dict[str, float]] = field(default_factory=dict)
    """Site -> group -> norm of its update, for replies that passed the first guards."""
    shares: dict[str, dict[str, float]] = field(default_factory=dict)
    """Site -> group -> its share of the weight as it counted, for accepted replies; of the experts of a pooled group
    that three sites or more used, the largest."""


class GroupedMean(Strategy):
    """Mean of updates per group; site -> groups and greatest weights come from the handshakes."""

    def __init__(
        self, run: RunConfig, manifest: GroupManifest, roster: Mapping[int, Handshake], memory: Memory | None = None
    ) -> None:
        """A strategy for one run.

        Args:
            run: Its description.
            manifest: Layout of the groups.
            roster: Node id -> handshake of the sites that take part; may be replaced between rounds.
            memory: That of the round before; empty before the first.
        """
        self.run = run
        self.manifest = manifest
        self.roster = roster
        self.memory = memory or Memory()
        self.asked: dict[int, Handshake] = {}
        """Those of the roster that are asked in this round."""
        self.outcome = RoundOutcome()
        self.bytes_down: Mapping[str, int] = {}
        """Group -> bytes sent to the sites of this round."""
        self._global = ArrayRecord()
        self._run_id = ""
        self._bounds = NormBounds(run, 1, {})
        self._directions = Directions(LIMIT, Memory())
        self._most: Mapping[str, float] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per site that is asked, with the groups it trains."""
        self.asked = draw_sites(self.run, self.roster, server_round)
        self._global = arrays
        self._run_id = str(config["run-id"])
        downlink = Downlink(arrays, self.memory, teacher=self._average())
        self.bytes_down = downlink.bytes
        for node_id, handshake in self.asked.items():
            yield Message(
                downlink.content(handshake, config),
                node_id,
                MessageType.TRAIN,
                ttl=self.run.federation.round_timeout_s,
                group_id=str(server_round),
            )

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """New global arrays from the good replies; what happened stands in `outcome`."""
        self.outcome = RoundOutcome()
        spaces = {group: NpySpace(self.manifest.size(group)) for group in self.manifest.groups}
        self._bounds = NormBounds(self.run, server_round, self.memory.norms)
        self._directions = Directions(self.run.sharing.guards.direction or LIMIT, self.memory)
        self._most = self._most_weight()
        means = {group: self._empty_mean(group, spaces[group]) for group in self.manifest.groups}
        self._add_replies(replies, means, server_round)
        accepted = sorted(self.outcome.accepted)
        self.outcome.shares = self._shares()
        norms = remember(self.memory.norms, server_round, {site: self.outcome.norms[site] for site in accepted})
        holders = tuple(accepted) if self._is_coded else ()
        after = Memory(norms, lost=dict(self.memory.lost), holders=holders)
        self._directions.remember(after)
        released = self._released(server_round, means)
        moved = [group for group, mean in released if self._move(group, mean, spaces[group].numbers, after)]
        arrays = dict(self._global) | {group: hand_over(spaces[group]) for group in moved}
        if average := self._average():
            after.average |= follow(average, _views(arrays), self.run.train.server_ema)
        self.memory = after
        return ArrayRecord(arrays), self._metrics()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: a site's validation loss comes with its training reply."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Nothing."""

    def summary(self) -> None:
        """Nothing: the run folder tells."""

    def _add_replies(self, replies: Iterable[Message], means: Mapping[str, GroupMean], server_round: int) -> None:
        """Add the updates that pass the guards, one by one; `outcome` keeps the rest of their replies."""
        doubted: dict[str, tuple[RoundReply, str]] = {}
        for message in replies:
            site = self.asked[message.metadata.src_node_id].site
            if doubt := self._take(site, message, means, server_round):
                doubted[site] = doubt
            del message
        self._settle(doubted, means)

    def _take(
        self, site: str, message: Message, means: Mapping[str, GroupMean], server_round: int
    ) -> tuple[RoundReply, str] | None:
        """Add a reply, or refuse it; one that only its direction speaks against is returned, with the reason."""
        try:
            reply = self._checked(message, server_round)
            self._add(site, reply, means)
        except PointsElsewhereError as error:
            return reply, one_line(str(error))
        except ProtocolError as error:
            self.outcome.rejected[site] = one_line(str(error))
        return None

    def _settle(self, doubted: Mapping[str, tuple[RoundReply, str]], means: Mapping[str, GroupMean]) -> None:
        """Refuse the replies that only their direction speaks against, if they are a minority; else add them."""
        if len(doubted) < len(self.outcome.accepted):
            self.outcome.rejected |= {site: reason for site, (_, reason) in doubted.items()}
            return
        for site, (reply, reason) in sorted(doubted.items()):
            logger.warning("%s: %s; counts, for as many others do", site, reason)
            self._add(site, reply, means, is_doubted=True)

    def _checked(self, message: Message, server_round: int) -> RoundReply:
        """A reply whose words and weights may be so. Raises ProtocolError for another."""
        handshake = self.asked[message.metadata.src_node_id]
        reply = self._read(message, handshake)
        check_reply(reply, handshake, self._limits(handshake), of=(self._run_id, server_round))
        check_gate_mass(self.run, self.manifest, reply.weights, subjects=handshake.subjects)
        return self._lowered(reply)

    def _lowered(self, reply: RoundReply) -> RoundReply:
        """A reply with weights that are no larger than those of the median site allow."""
        weights = {
            group: tuple(min(weight, self._most.get(group, weight)) for weight in weights)
            for group, weights in reply.weights.items()
        }
        return replace(reply, weights=weights)

    def _most_weight(self) -> dict[str, float]:
        """Group -> the most that one site may weigh, where enough are asked for a median to tell."""
        limits: dict[str, list[float]] = {}
        for handshake in self.asked.values():
            for group, weights in self._limits(handshake).items():
                limits.setdefault(group, []).append(max(weights, default=0.0))
        most = self.run.federation.max_weight
        return {group: most * median(weights) for group, weights in limits.items() if len(weights) >= FEWEST}

    def _add(self, site: str, reply: RoundReply, means: Mapping[str, GroupMean], *, is_doubted: bool = False) -> None:
        """Add a reply's updates, and the reply to `outcome`. Raises ProtocolError, and all is as it was.

        Args:
            is_doubted: Its direction is not judged again.
        """
        norms: dict[str, float] = {}
        try:
            for group, update in reply.updates.items():
                norms[group] = _named(group, means[group].add, update, reply.weights[group])
            trained = self._judge(site, reply, norms, is_doubted=is_doubted)
        except ProtocolError:
            _take_off(reply, means, norms)
            raise
        self._shorten(site, reply, means, trained)
        self.outcome.norms[site] = trained
        self.outcome.accepted[site] = replace(reply, updates={})

    def _shorten(self, site: str, reply: RoundReply, means: Mapping[str, GroupMean], norms: dict[str, float]) -> None:
        """Replace updates that are longer than usual by shorter ones of the same direction."""
        for group, norm in norms.items():
            if norm > (clip := self._bounds.clip(site, group)):
                update, weights = reply.updates[group], reply.weights[group]
                means[group].take_off(update, weights)
                means[group].add(update * np.float32(clip / norm), weights)

    def _read(self, message: Message, handshake: Handshake) -> RoundReply:
        if handshake.site in self.outcome.accepted:
            raise ProtocolError("second reply to one question")
        reply = RoundReply.from_records(unpack(message.content))
        for group, size in bytes_per_group(reply.updates).items():
            self.outcome.bytes_up[group] = self.outcome.bytes_up.get(group, 0) + size
        return replace(reply, updates=decode(self.run.sharing.coding, self.manifest, reply.updates))

    def _judge(self, site: str, reply: RoundReply, norms: dict[str, float], *, is_doubted: bool) -> dict[str, float]:
        """Norms of the groups that a reply trained. Raises ProtocolError if one is too long, or an update points
        elsewhere."""
        trained = self._bounds.check(site, reply, norms)
        cosines = {group: self._directions.cosine(group, norm) for group, norm in trained.items()}
        if not is_doubted:
            self._directions.check(site, cosines)
        self._directions.accept(site, cosines)
        return trained

    def _shares(self) -> dict[str, dict[str, float]]:
        shares: dict[str, dict[str, float]] = {site: {} for site in sorted(self.outcome.accepted)}
        for group in self.manifest.groups:
            replies = {site: reply for site, reply in self.outcome.accepted.items() if group in reply.weights}
            for which in range(self._num_weights(group)):
                weights = {site: reply.weights[group][which] for site, reply in sorted(replies.items())}
                if self.run.sharing.mean_of(group) == "median":
                    weights = {site: float(weight > 0.0) for site, weight in weights.items()}
                if is_pooled(self.run, group) and sum(map(bool, weights.values())) < FEWEST:
                    continue
                for site, share in capped_shares(weights, largest_share(self.run)).items():
                    shares[site][group] = max(shares[site].get(group, 0.0), share)
        return shares

    def _num_weights(self, group: str) -> int:
        return len(self.manifest.experts(group)) if is_pooled(self.run, group) else 1

    def _released(self, server_round: int, means: dict[str, GroupMean]) -> Iterator[tuple[str, Flat | None]]:
        """Mean of each group; None, and the group stays as it is, where nobody trained it."""
        for group in self.manifest.groups:
            yield group, means.pop(group).mean()

    def _limits(self, handshake: Handshake) -> dict[str, Weights]:
        return {
            group: weight_limits(
                self.run, self.manifest, group, subjects=handshake.subjects, subjects_per_stream=handshake.streams
            )
            for group in handshake.group_hashes
        }

    def _empty_mean(self, group: str, space: NpySpace) -> GroupMean:
        limits = [
            min(max(self._limits(handshake)[group], default=0.0), self._most.get(group, math.inf))
            for handshake in self.asked.values()
            if group in handshake.group_hashes
        ]
        start = view_array(self._global[group])
        limit = sum(limits) or 1.0
        votes = self._count_votes(group, len(start))
        return empty_mean(self.run, self.manifest, group, start, weight_limit=limit, space=space.numbers, votes=votes)

    def _count_votes(self, group: str, size: int) -> Votes | None:
        return self._directions.start(group, size, len(self.asked))

    def _move(self, group: str, update: Flat | None, space: Flat, after: Memory) -> bool:
        """Put a group where the server optimiser takes it; what is to be remembered of it goes into `after`.

        Args:
            update: Its mean update; may lie in the space.
            space: Takes the group.
        Returns:
            Whether it moves.
        """
        slots = self.memory.slots.get(group, {})
        if update is None or not self._has_quorum(group):
            after.slots |= {group: slots} if slots else {}
            return False
        step, slots = server_step(self.run.sharing.optimiser_of(group), update, slots)
        after.slots |= {group: slots} if slots else {}
        start = view_array(self._global[group])
        if self._is_coded:
            coding = self.run.sharing.coding
            arrays, lost = code_step(coding, self.manifest, group, step, self.memory.lost)
            after.step |= arrays
            after.lost |= lost
            space[:] = take_step(coding, self.manifest, {group: start}, arrays)[group]
        else:
            np.add(start, step, out=space)
        return True

    @property
    def _is_coded(self) -> bool:
        """Whether steps are sent: float32 would gain nothing."""
        return self.run.sharing.coding != "float32"

    def _average(self) -> Mapping[str, Flat]:
        """The EMA that teachers start at, before the round's replies; empty if they start elsewhere."""
        if self.run.train.teacher_start != "server-ema":
            return {}
        return self.memory.average or _views(self._global)

    def _has_quorum(self, group: str) -> bool:
        trained = sum(any(reply.weights.get(group, ())) for reply in self.outcome.accepted.values())
        return stream_of(group) is None or trained >= self.run.federation.sites_per_stream

    def _metrics(self) -> MetricRecord:
        return MetricRecord({"num-accepted": len(self.outcome.accepted), "num-rejected": len(self.outcome.rejected)})


def _named(group: str, add: Callable[[Flat, Weights], float], update: Flat, weights: Weights) -> float:
    try:
        return add(update, weights)
    except ProtocolError as error:
        raise ProtocolError(f"{group}: {error}") from error


def _take_off(reply: RoundReply, means: Mapping[str, GroupMean], groups: Iterable[str]) -> None:
    for group in groups:
        means[group].take_off(reply.updates[group], reply.weights[group])


def _views(arrays: Mapping[str, Array]) -> dict[str, Flat]:
    return {group: view_array(array) for group, array in arrays.items()}
