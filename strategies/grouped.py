"""Grouped mean: each group of parameters is averaged over the sites that trained it, by how much they trained it.

    1. ask        draw sites; send each the groups it trains                          round_messages.py
    2. read       one reply at a time: unpack, decode, check content and weights      reply_guards.py, weight_caps.py
    3. add        add its updates to the means; norms and directions are judged       group_means.py, reply_guards.py
                  afterwards, and a refused reply is removed again
    4. settle     once all replies are there: refuse or add those whose direction alone is doubted
    5. step       mean of each group -> server optimiser -> new global parameters     server_step.py
    6. remember   norms, votes, optimiser slots and coded step for the next round     server_step.py

Flower's FedAvg wants the same keys and one weight from every site. Here each site receives and returns its own groups,
with a weight for each. The order of the replies does not change a bit of the result, and a reply is freed before the
next one is read. A group that nobody trained keeps its bytes.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from panfm.config import RunConfig
from panfm.errors import ProtocolError, one_line
from panfm.sharing.coding import decode, take_step
from panfm.sharing.groups import Flat, GroupManifest, stream_of
from panfm.sharing.messages import Handshake, RoundReply
from panfm.sharing.npy import NpySpace
from panfm.sharing.weights import GroupWeights
from strategies.exact_mean import Votes
from strategies.group_means import GroupMean, GroupSetup, make_mean, usual_size
from strategies.reply_guards import LIMIT, Directions, NormBounds, PointsElsewhereError, check_reply
from strategies.round_messages import (
    Downlink,
    bytes_per_group,
    code_step,
    draw_sites,
    hand_over,
    unpack,
    view_array,
    view_arrays,
)
from strategies.server_step import Memory, add_norms, follow_average, server_step
from strategies.weight_caps import WeightLimits, check_gate_mass, group_shares

logger = logging.getLogger(__name__)


@dataclass
class RoundOutcome:
    """Accepted and rejected replies of one round, by site."""

    accepted: dict[str, RoundReply] = field(default_factory=dict)
    """Site -> its reply, without the updates."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Site -> why its reply was refused."""
    bytes_up: dict[str, int] = field(default_factory=dict)
    """Group -> bytes of updates as they arrived, refused ones included."""
    site_bytes_up: dict[str, int] = field(default_factory=dict)
    """Site -> bytes of its update as it arrived, refused or not."""
    norms: dict[str, dict[str, float]] = field(default_factory=dict)
    """Site -> group -> norm of its update, for accepted replies."""
    shares: dict[str, dict[str, float]] = field(default_factory=dict)
    """Site -> group -> its share of the weight as it counted, for accepted replies (`group_shares`)."""


class GroupedMean(Strategy):
    """Flower strategy that averages each group over the sites that trained it."""

    def __init__(
        self,
        run: RunConfig,
        manifest: GroupManifest,
        roster: Mapping[int, Handshake],
        memory: Memory | None = None,
        *,
        frozen: Mapping[str, Flat] | None = None,
    ) -> None:
        """Create the strategy of a run.

        Args:
            run: Run description.
            manifest: Layout of the groups.
            roster: Node id -> handshake of the sites that take part; may be replaced between rounds.
            memory: Memory of the round before; empty before the first.
            frozen: Group -> its parameters that the run does not train.
        """
        self.run = run
        self.manifest = manifest
        self.roster = roster
        self.memory = memory or Memory()
        self.frozen = frozen or {}
        self.asked: dict[int, Handshake] = {}
        """Sites of the roster that are asked in this round."""
        self.outcome = RoundOutcome()
        self.bytes_down: Mapping[str, int] = {}
        """Group -> bytes sent to the sites of this round."""
        self.site_bytes_down: Mapping[str, int] = {}
        """Site -> bytes sent to it in this round."""
        self._weights = GroupWeights(run.sharing, run.train, run.site_dp, manifest)
        self._max_share = 1.0 if run.site_dp else run.federation.max_share  # under [site-dp] all weigh alike
        self._run_id = ""
        self._global = ArrayRecord()
        """Global parameters at the start of the round."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Yield one message for each asked site, with the groups it trains."""
        self.asked = draw_sites(self.run.federation, self.run.seed, self.roster, server_round)
        self._global = arrays
        self._run_id = str(config["run-id"])
        downlink = Downlink(arrays, self.memory, teacher=self._teacher_average(), frozen=self.frozen)
        self.bytes_down, self.site_bytes_down = downlink.bytes, downlink.site_bytes
        for node_id, handshake in self.asked.items():
            yield Message(
                downlink.content(handshake, config),
                node_id,
                MessageType.TRAIN,
                ttl=self.run.federation.round_timeout_s,
                group_id=str(server_round),
            )

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """Return the new global parameters; `outcome` tells which replies were accepted."""
        spaces = {group: NpySpace(self.manifest.size(group)) for group in self.manifest.groups}
        self._start_round(server_round, spaces)
        self._add_replies(replies)
        self.outcome.shares = group_shares(self._weights, self._max_share, self.outcome.accepted)
        memory = self._next_memory(server_round)
        moved = [
            group
            for group, update in self._mean_updates(server_round)
            if self._step_group(group, update, spaces[group].numbers, memory)
        ]
        arrays = ArrayRecord(dict(self._global) | {group: hand_over(spaces[group]) for group in moved})
        if average := self._teacher_average():
            memory.average |= follow_average(average, view_arrays(arrays), self.run.train.server_ema)
        self.memory = memory
        counts = {"num-accepted": len(self.outcome.accepted), "num-rejected": len(self.outcome.rejected)}
        return arrays, MetricRecord(dict(counts))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nothing: a site's validation loss comes with its training reply."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Do nothing."""

    def summary(self) -> None:
        """Do nothing: the run folder tells."""

    def _start_round(self, server_round: int, spaces: Mapping[str, NpySpace]) -> None:
        """Prepare the guards and an empty mean for each group; a mean works in the memory of its group's space."""
        self.outcome = RoundOutcome()
        self._round = server_round
        self._weight_limits = WeightLimits(self._weights, self.run.federation.max_weight, self.asked.values())
        self._bounds = NormBounds(self.run.sharing, self.run.train, server_round, self.memory.norms)
        self._directions = Directions(self.run.sharing.guards.direction or LIMIT, self.memory)
        self._means = {group: self._empty_mean(group, space) for group, space in spaces.items()}

    def _empty_mean(self, group: str, space: NpySpace) -> GroupMean:
        start = view_array(self._global[group])
        setup = GroupSetup(
            self._weights.segments(group),
            self._weight_limits.total(group),
            layers=self._weights.layers(group),
            start=start,
            max_share=self._max_share,
            usual=usual_size(self.run.train, self.run.site_dp),
            trim=self.run.sharing.trim,
            space=space.numbers,
            votes=self._empty_votes(group, len(start)),
        )
        return make_mean(self.run.sharing, group, setup)

    def _empty_votes(self, group: str, size: int) -> Votes | None:
        return self._directions.votes(group, size, len(self.asked))

    def _add_replies(self, replies: Iterable[Message]) -> None:
        """Add each reply that passes the guards, or refuse it; decide on doubted ones once all are there."""
        doubted: dict[str, tuple[RoundReply, str]] = {}
        for message in replies:
            site = self.asked[message.metadata.src_node_id].site
            if doubt := self._add_or_refuse(site, message):
                doubted[site] = doubt
            del message
        self._settle(doubted)

    def _add_or_refuse(self, site: str, message: Message) -> tuple[RoundReply, str] | None:
        """Add a reply or refuse it; return it, with the reason, if only its direction speaks against it."""
        try:
            reply = self._read_and_check(message)
            self._add(site, reply)
        except PointsElsewhereError as error:
            return reply, one_line(str(error))
        except ProtocolError as error:
            self.outcome.rejected[site] = one_line(str(error))
        return None

    def _read_and_check(self, message: Message) -> RoundReply:
        """Return a reply with capped weights. Raises ProtocolError if it states what cannot be."""
        handshake = self.asked[message.metadata.src_node_id]
        reply = self._read(message, handshake)
        limits = self._weight_limits.of_site(handshake.site)
        check_reply(reply, handshake, limits, of=(self._run_id, self._round))
        check_gate_mass(self._weights, reply.weights, subjects=handshake.subjects)
        return self._weight_limits.cap(reply)

    def _read(self, message: Message, handshake: Handshake) -> RoundReply:
        """Unpack and decode a reply. Raises ProtocolError if that fails, or the site has replied already."""
        if handshake.site in self.outcome.accepted:
            raise ProtocolError("second reply to one question")
        reply = RoundReply.from_records(unpack(message.content))
        sizes = bytes_per_group(reply.updates)
        self.outcome.site_bytes_up[handshake.site] = sum(sizes.values())
        for group, size in sizes.items():
            self.outcome.bytes_up[group] = self.outcome.bytes_up.get(group, 0) + size
        return replace(reply, updates=decode(self.run.sharing.coding, self.manifest, reply.updates))

    def _add(self, site: str, reply: RoundReply, *, is_doubted: bool = False) -> None:
        """Add a reply's updates to the means and the reply to `outcome`.

        Args:
            is_doubted: Do not judge its direction again.
        Raises:
            ProtocolError: a guard refuses it; all means are as they were.
        """
        norms: dict[str, float] = {}
        try:
            for group, update in reply.updates.items():
                norms[group] = self._add_update(group, update, reply)
            norms = self._judge(site, reply, norms, is_doubted=is_doubted)
        except ProtocolError:
            for group in norms:
                self._means[group].remove(reply.updates[group], reply.weights[group])
            raise
        self._shorten(site, reply, norms)
        self.outcome.norms[site] = norms
        self.outcome.accepted[site] = replace(reply, updates={})

    def _add_update(self, group: str, update: Flat, reply: RoundReply) -> float:
        """Add one update to its group's mean, and return its norm."""
        try:
            return self._means[group].add(update, reply.weights[group])
        except ProtocolError as error:
            raise ProtocolError(f"{group}: {error}") from error

    def _judge(self, site: str, reply: RoundReply, norms: dict[str, float], *, is_doubted: bool) -> dict[str, float]:
        """Return the norms of the groups that a site trained.

        Raises:
            ProtocolError: an update is too long.
            PointsElsewhereError: an update points elsewhere.
        """
        trained = self._bounds.check(site, reply, norms)
        cosines = {group: self._directions.cosine(group, norm) for group, norm in trained.items()}
        if not is_doubted:
            self._directions.check(site, cosines)
        self._directions.accept(site, cosines)
        return trained

    def _shorten(self, site: str, reply: RoundReply, norms: Mapping[str, float]) -> None:
        """Replace updates that are longer than usual by shorter ones of the same direction."""
        for group, norm in norms.items():
            if norm > (clip := self._bounds.clip(site, group)):
                update, weights = reply.updates[group], reply.weights[group]
                self._means[group].remove(update, weights)
                self._means[group].add(update * np.float32(clip / norm), weights)

    def _settle(self, doubted: Mapping[str, tuple[RoundReply, str]]) -> None:
        """Refuse the replies that only their direction speaks against if they are a minority; else add them."""
        if len(doubted) < len(self.outcome.accepted):
            self.outcome.rejected |= {site: reason for site, (_, reason) in doubted.items()}
            return
        for site, (reply, reason) in sorted(doubted.items()):
            logger.warning("%s: %s; counts, for as many others do", site, reason)
            self._add(site, reply, is_doubted=True)

    def _next_memory(self, server_round: int) -> Memory:
        """Memory for the next round, with norms and votes of this one; steps of the groups are added later."""
        accepted = sorted(self.outcome.accepted)
        norms = add_norms(self.memory.norms, server_round, {site: self.outcome.norms[site] for site in accepted})
        holders = tuple(accepted) if self._sends_steps else ()
        asked = {handshake.site for handshake in self.asked.values()}
        frozen_holders = (set(self.memory.frozen_holders) - asked) | set(accepted) if self.frozen else ()
        memory = Memory(
            norms, lost=dict(self.memory.lost), holders=holders, frozen_holders=tuple(sorted(frozen_holders))
        )
        self._directions.remember(memory)
        return memory

    def _mean_updates(self, server_round: int) -> Iterator[tuple[str, Flat | None]]:
        """Yield the mean update of each group; None if nobody trained it."""
        for group in self.manifest.groups:
            yield group, self._means.pop(group).mean()

    def _step_group(self, group: str, update: Flat | None, space: Flat, memory: Memory) -> bool:
        """Write the new global parameters of a group into its space, and what the next round needs into `memory`.

        Args:
            update: Mean update; may lie in the space.
        Returns:
            Whether the group moves; it does not without a mean update or enough sites.
        """
        slots = self.memory.slots.get(group, {})
        is_moved = update is not None and self._has_enough_sites(group)
        if update is not None and is_moved:
            step, slots = server_step(self.run.sharing.optimiser_of(group), update, slots)
            self._take_step(group, step, space, memory)
        if slots:
            memory.slots[group] = slots
        return is_moved

    def _take_step(self, group: str, step: Flat, space: Flat, memory: Memory) -> None:
        """Add a step to the global parameters; a coded one as the sites will decode it."""
        start = view_array(self._global[group])
        if not self._sends_steps:
            np.add(start, step, out=space)
            return
        coding = self.run.sharing.coding
        coded, lost = code_step(coding, self.manifest, group, step, self.memory.lost)
        memory.step |= coded
        memory.lost |= lost
        space[:] = take_step(coding, self.manifest, {group: start}, coded)[group]

    def _has_enough_sites(self, group: str) -> bool:
        """Whether `federation.sites-per-stream` sites trained a stream's group; always for other groups."""
        trained = sum(any(reply.weights.get(group, ())) for reply in self.outcome.accepted.values())
        return stream_of(group) is None or trained >= self.run.federation.sites_per_stream

    @property
    def _sends_steps(self) -> bool:
        """Whether sites are sent coded steps; as float32 they would be as large as all parameters."""
        return self.run.sharing.coding != "float32"

    def _teacher_average(self) -> Mapping[str, Flat]:
        """EMA of the global parameters where teachers start, before this round's step; empty if they do not."""
        if self.run.train.teacher_start != "server-ema":
            return {}
        return self.memory.average or view_arrays(self._global)
