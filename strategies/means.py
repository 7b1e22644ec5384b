"""The mean that `[sharing]` names for a group."""

import math
from typing import Protocol

from panfm.config import RunConfig
from panfm.sharing.groups import Flat, GroupManifest
from panfm.sharing.mean import ExactMean
from panfm.sharing.weights import Weights, weight_segments
from strategies.divergence import DivergenceMean
from strategies.robust import HeldMean


class GroupMean(Protocol):
    """Takes the updates of one group as they come.

    Guarantees:
        order: any permutation of the same contributions gives the same bits.
    """

    def check(self, update: Flat, weights: Weights) -> float:
        """L2 norm of an update that may be added; changes nothing. Raises ProtocolError as `add` does."""

    def add(self, update: Flat, weights: Weights, *, checked: bool = False) -> None:
        """Add one site's contribution; `checked`: that `check` has let pass just now."""

    def mean(self) -> Flat | None:
        """float32, once; None if nobody contributed any weight. Experts to which nobody did are -0.0."""


def empty_mean(run: RunConfig, manifest: GroupManifest, group: str, start: Flat, *, weight_limit: float) -> GroupMean:
    """A mean without contributions.

    Args:
        start: Global parameters of the group at the start of the round.
        weight_limit: No weight sums to more than this over all contributions.
    """
    segments = weight_segments(run, manifest, group)
    kind = run.sharing.mean_of(group)
    if kind == "weighted":
        return ExactMean(segments, weight_limit=weight_limit, usual=usual_size(run))
    if kind == "l-dawa":
        layers = tuple((math.prod(shape), 0) for _, shape in manifest.groups[group])
        return DivergenceMean(
            segments if len(segments) > 1 else layers, start, weight_limit=weight_limit, usual=usual_size(run)
        )
    return HeldMean(segments, kind, trim=run.sharing.trim, weight_limit=weight_limit)


def usual_size(run: RunConfig) -> float:
    """What few numbers of an update exceed: twice a learning rate per local step, which is about what AdamW moves a
    parameter at most; of a clipped update, a sixteenth of its norm."""
    if run.server_privacy:
        return run.server_privacy.clip_norm / 16.0
    return 2.0 * run.train.learning_rate * run.train.local_steps
