"""`[federation]`: how the round loop treats sites."""

from typing import Annotated

from pydantic import Field

from panfm.config.base import Positive, Timeout, Uncoupled


class FederationConfig(Uncoupled):
    """Settings of the round loop: quorum, participation, deadlines, and caps on sites."""

    min_sites: Annotated[int, Field(gt=0, le=100_000)] = 2
    """A round needs this many good replies, and a run this many sites that shake hands."""
    round_timeout_s: Timeout = 3600.0
    """A site that has not answered by then is left out of the round."""
    join_timeout_s: Timeout = 120.0
    """How long to wait for sites before round 1. It ends when `min-sites` are there and no other comes for 10 s."""
    wait_for_quorum_s: Annotated[float, Field(ge=0.0, le=2_592_000.0)] = 86_400.0
    """If fewer than `min-sites` answer, and the others are away, late or at fault in a way that can heal, the round is
    asked again until enough answer, for at most this long; then the run ends and can be resumed. Also before round 1
    and for sums. 0: it ends at once. Simulations never wait."""
    ping_timeout_s: Annotated[float, Field(ge=0.0, le=3600.0)] = 30.0
    """A site from which nothing came for so long is sent a short message before a round, and is left out of it if it
    does not answer within as long again. 0, and in simulations: no such message."""
    max_subjects: Positive = 1_000_000
    """A site that says it has more is refused: its word decides how much it may weigh."""
    max_share: Annotated[float, Field(ge=0.02, le=1.0)] = 0.5
    """Largest share of the weight of a group, or of a pooled expert, that one of three contributing sites or more has,
    whatever it says of itself; never less than an equal share (strategies/weight_caps.py). Below 0.5 a server keeps up
    to 1 / max-share updates of unequal sites in memory. Two sites count as they say: give a table of expected subjects
    (`python -m server start --roster`) where that is too much trust."""
    max_weight: Annotated[float, Field(ge=1.0, le=1e6)] = 1.0
    """A site weighs in a group at most this many times as much as the median site may, of three sites or more."""
    participation: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the sites that is asked in a round, drawn anew each time; never fewer than `min-sites`."""
    sites_per_stream: Annotated[int, Field(gt=0, le=100_000)] = 1
    """A stream's parameters move only in rounds in which this many sites trained them; otherwise they stay as they
    are, and the round goes on. A stream that fewer sites hold is never trained by the federation."""
