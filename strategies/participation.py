"""Which sites are asked in a round: all, or a share of them drawn anew each time."""

from collections.abc import Mapping

from panfm.config import RunConfig
from panfm.seeds import numpy_generator
from panfm.sharing.messages import Handshake


def draw_sites(run: RunConfig, roster: Mapping[int, Handshake], round_number: int) -> dict[int, Handshake]:
    """`federation.participation` of the sites, at least `federation.min-sites`, in the order of the roster.

    Guarantees:
        repeatable: the draw depends on the run's seed, the round and the names of the sites, nothing else.
    """
    num = max(run.federation.min_sites, round(run.federation.participation * len(roster)))
    if num >= len(roster):
        return dict(roster)
    names = sorted(handshake.site for handshake in roster.values())
    drawn = set(numpy_generator(run.seed, "participation", round_number).choice(names, num, replace=False).tolist())
    return {node_id: handshake for node_id, handshake in roster.items() if handshake.site in drawn}
