"""Grouped mean with site-level privacy (`[server-privacy]`): whole updates clipped, equal weights, and noise.

Flower's wrappers pair the arrays of a reply with the model's by position, and so cannot serve sites with unlike groups;
their noise comes from a seeded generator. Here an update is clipped by its keys, as a whole (panfm/privacy/site_dp.py).

What a site states of itself, losses, weights and norms of its update, is dropped as its reply is read, so that neither
model nor run folder can depend on it. A round in which one of the sites is missing or refused releases nothing and
costs nothing. Server optimisers see the noised mean alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from panfm.config import RunConfig
from panfm.errors import ProtocolError
from panfm.privacy.site_dp import clip_update, noised_mean
from panfm.sharing.groups import Flat, GroupManifest
from panfm.sharing.messages import Handshake, RoundReply
from strategies.exact_mean import Votes
from strategies.grouped import GroupedMean
from strategies.strategy_memory import Memory


class SiteDpMean(GroupedMean):
    """Noised mean of clipped updates over a fixed set of sites."""

    def __init__(
        self,
        run: RunConfig,
        manifest: GroupManifest,
        roster: Mapping[int, Handshake],
        memory: Memory | None = None,
        *,
        pay: Callable[[int], None],
    ) -> None:
        """Create the strategy of a run.

        Args:
            roster: As for `GroupedMean`; its sites are those of all rounds.
            pay: Called with the round number before noise is drawn; raises if the budget does not cover it.
        """
        super().__init__(run, manifest, roster, memory)
        assert run.server_privacy is not None
        self._site_dp = run.server_privacy
        self._pay = pay
        self._sites = frozenset(handshake.site for handshake in roster.values())

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Yield the messages of `GroupedMean`, for the sites of the first round only."""
        self.roster = {node: handshake for node, handshake in self.roster.items() if handshake.site in self._sites}
        return super().configure_train(server_round, arrays, config, grid)

    def _read(self, message: Message, handshake: Handshake) -> RoundReply:
        """Read a reply, clip its updates together, and drop all else that it states."""
        reply = super()._read(message, handshake)
        for group, update in reply.updates.items():
            if update.dtype != np.float32 or update.ndim != 1:
                raise ProtocolError(f"{group}: update is {update.dtype} {list(update.shape)}, expected flat float32")
        return RoundReply(
            reply.run_id,
            reply.round_number,
            reply.state_round,
            clip_update(reply.updates, self._site_dp.clip_norm),
            dict.fromkeys(handshake.group_hashes, (1.0,)),
        )

    def _judge(self, site: str, reply: RoundReply, norms: dict[str, float], *, is_doubted: bool) -> dict[str, float]:
        """Judge and keep nothing: the clip bounds the norms, and norms tell of the site."""
        return {}

    def _empty_votes(self, group: str, size: int) -> Votes | None:
        """Count no signs: they tell of the sites."""
        return None

    def _mean_updates(self, server_round: int) -> Iterator[tuple[str, Flat | None]]:
        """Yield the noised mean of each group, once it is paid for; None for all groups if a site is missing."""
        if len(self.outcome.accepted) != self._site_dp.num_sites:
            self._means.clear()
            yield from dict.fromkeys(self.manifest.groups).items()
            return
        self._pay(server_round)
        for group, mean in super()._mean_updates(server_round):
            yield group, None if mean is None else self._noised(group, mean)

    def _noised(self, group: str, mean: Flat) -> Flat:
        num_sites = sum(group in handshake.group_hashes for handshake in self.asked.values())
        return noised_mean(mean, num_sites, clip_norm=self._site_dp.clip_norm, noise=self._site_dp.noise_multiplier)
