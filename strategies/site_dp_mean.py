"""Grouped mean with site-level privacy (`[site-dp]`): whole updates clipped to one norm, equal weights, noise.

    S = sum_k u_k min(1, C / ||u_k||) + N(0, (z C)^2),      ||.|| over all groups that site k sends, together
    step of group g = S_g / n_g,                            n_g sites train g

Sites send unlike groups: u_k is zero in those that site k does not train. If a site's updates are zeroed out, S moves
by at most C, in L2 over all groups; so group g alone moves by at most C / n_g, where n_g does not change, for who
trains what is public. Noise of z C on the whole of S is noise of z C / n_g on the mean of g.

What a site states of itself, losses, weights and norms of its update, is dropped as its reply is read, so that neither
model nor run folder can depend on it. A round in which one of the sites is missing or refused releases nothing and
costs nothing. Server optimisers see the noised mean alone. (Flower's wrappers pair the arrays of a reply with the
model's by position, so they cannot serve sites with unlike groups, and their noise comes from a seeded generator.)

Source: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models" (there with sampled users).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from panfm.config import RunConfig
from panfm.errors import ProtocolError
from panfm.privacy.randomness import with_noise
from panfm.sharing.groups import Flat, GroupManifest
from panfm.sharing.messages import Handshake, RoundReply
from strategies.exact_mean import Votes
from strategies.grouped import GroupedMean
from strategies.server_step import Memory

_CHUNK = 1 << 16
_LEAST = float(np.finfo(np.float32).tiny)
"""Below it float32 has few digits."""


def clip_update(updates: Mapping[str, Flat], clip_norm: float) -> dict[str, Flat]:
    """One site's updates, float32, scaled to a joint L2 norm of at most `clip_norm`.

    Guarantees:
        bounded: the norm over all groups is at most clip_norm (1 + 1e-6).
        poison: an update that holds a number that is not finite, or is 2^126 times too long, becomes zero.
    """
    norm = float(np.sqrt(sum(map(_squared_norm, updates.values()))))
    if not norm * _LEAST <= clip_norm:
        return {group: np.zeros_like(update) for group, update in updates.items()}
    factor = np.float32(min(1.0, clip_norm / norm)) if norm else np.float32(1.0)
    return {group: update * factor for group, update in updates.items()}


def noised_mean(mean: Flat, num_sites: int, *, clip_norm: float, noise: float) -> Flat:
    """The mean of a group's clipped updates plus noise, float32.

    Args:
        mean: Over `num_sites` sites, all with the same weight.
        noise: Standard deviation of the noise on the sum, in clip norms.
    """
    deviation = noise * clip_norm / num_sites
    return with_noise(torch.from_numpy(mean.astype(np.float64)), deviation).float().numpy()


def _squared_norm(update: Flat) -> float:
    chunks = (update[start : start + _CHUNK].astype(np.float64) for start in range(0, len(update), _CHUNK))
    return sum(float(np.dot(chunk, chunk)) for chunk in chunks)


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
        frozen: Mapping[str, Flat] | None = None,
    ) -> None:
        """Create the strategy of a run.

        Args:
            roster: As for `GroupedMean`; its sites are those of all rounds.
            pay: Called with the round number before noise is drawn; raises if the budget does not cover it.
            frozen: As for `GroupedMean`.
        """
        super().__init__(run, manifest, roster, memory, frozen=frozen)
        assert run.site_dp is not None
        self._site_dp = run.site_dp
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
