"""The mean that `[sharing]` names for a group."""

import math
from typing import Protocol, assert_never

from panfm.config import RunConfig
from panfm.sharing.groups import Flat, GroupManifest
from panfm.sharing.mean import ExactMean, Votes
from panfm.sharing.weights import Weights, weight_segments
from strategies.divergence import DivergenceMean
from strategies.robust import HeldMean


class GroupMean(Protocol):
    """Takes the updates of one group as they come.

    Guarantees:
        order: any permutation of the same contributions gives the same bits.
    """

    def add(self, update: Flat, weights: Weights) -> float:
        """Add one site's contribution, and give its L2 norm. Raises ProtocolError, and is as it was."""

    def take_off(self, update: Flat, weights: Weights) -> None:
        """Undo `add` of the same contribution: to the bit, as if it had never come. Only of the last one."""

    def mean(self) -> Flat | None:
        """float32, once; None if nobody contributed any weight. Experts to which nobody did are -0.0."""


def empty_mean(
    run: RunConfig,
    manifest: GroupManifest,
    group: str,
    start: Flat,
    *,
    weight_limit: float,
    space: Flat,
    votes: Votes | None = None,
) -> GroupMean:
    """A mean without contributions.

    Args:
        start: Global parameters of the group at the start of the round.
        weight_limit: No weight sums to more than this over all contributions.
        space: float32 of the group's size, in which it may work, and in which the mean may be.
        votes: Where the signs of the updates are counted.
    """
    segments = weight_segments(run, manifest, group)
    max_share, usual = largest_share(run), usual_size(run)
    kind = run.sharing.mean_of(group)
    match kind:
        case "weighted":
            return ExactMean(
                segments, weight_limit=weight_limit, max_share=max_share, usual=usual, space=space, votes=votes
            )
        case "l-dawa":
            layers = tuple((math.prod(shape), 0) for _, shape in manifest.groups[group])
            layers = segments if len(segments) > 1 else layers
            return DivergenceMean(
                layers, start, weight_limit=weight_limit, max_share=max_share, usual=usual, space=space, votes=votes
            )
        case "median" | "trimmed" | "geometric-median":
            trim = run.sharing.trim
            return HeldMean(
                segments, kind, trim=trim, weight_limit=weight_limit, max_share=max_share, space=space, votes=votes
            )
        case _:
            assert_never(kind)


def largest_share(run: RunConfig) -> float:
    """What a site may have of a group's weight. Under site-level privacy all weigh alike; nothing is to be capped."""
    return 1.0 if run.server_privacy else run.federation.max_share


def usual_size(run: RunConfig) -> float:
    """What few numbers of an update exceed: twice a learning rate per local step, which is about what AdamW moves a
    parameter at most; of a clipped update, a sixteenth of its norm."""
    if run.server_privacy:
        return run.server_privacy.clip_norm / 16.0
    return 2.0 * run.train.learning_rate * run.train.local_steps
