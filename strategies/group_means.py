"""The mean of one group: its interface, and the choice by `sharing.mean`.

To add a mean, write a class with the methods of `GroupMean` and a line in `MEANS` (panfm/registry.py). A mean that
needs all updates of a round at once subclasses `BufferedMean` (robust_means.py); others add them to a sum as they
arrive, like `WeightedMean` (weighted_means.py).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

from panfm.config import RunConfig
from panfm.registry import MEANS
from panfm.sharing.groups import Flat, GroupManifest, Segments
from panfm.sharing.weights import Weights, weight_segments
from strategies.exact_mean import USUAL, Votes
from strategies.weight_caps import largest_share


@dataclass(frozen=True)
class GroupSetup:
    """Settings of a group's mean, known before the first update of a round arrives."""

    segments: Segments
    """Which of a site's weights counts for which numbers."""
    weight_limit: float
    """Largest sum of one weight over all sites."""
    layers: Segments = ()
    """As `segments`, one for each parameter tensor, or for each expert of one."""
    start: Flat | None = None
    """Global parameters at the start of the round, packed."""
    max_share: float = 1.0
    """Largest share of the weight that one of three sites or more has."""
    usual: float = USUAL
    """Few numbers of an update lie further from 0 than this."""
    trim: float = 0.0
    """`sharing.trim`."""
    space: Flat | None = None
    """Memory of the group's size, float32, that the mean may use and return."""
    votes: Votes | None = None
    """Where the signs of the updates are counted."""


class GroupMean(Protocol):
    """Mean of the updates of one group in one round.

    Guarantees:
        order: any permutation of the same contributions gives the same bits.
    """

    uses_weights: ClassVar[bool]
    """Whether a site's weight changes the result; if not, all sites that trained the group have one vote."""

    def __init__(self, setup: GroupSetup) -> None:
        """Create a mean without contributions."""

    def add(self, update: Flat, weights: Weights) -> float:
        """Add one site's update, and return its L2 norm. Raises ProtocolError, and then leaves the mean as it was."""

    def remove(self, update: Flat, weights: Weights) -> None:
        """Undo the last `add`, to the bit; the arguments are the same."""

    def mean(self) -> Flat | None:
        """Return the mean, float32; None if no weight was above 0, and -0.0 for experts that have none. Called once."""


def make_mean(
    run: RunConfig,
    manifest: GroupManifest,
    group: str,
    start: Flat,
    *,
    weight_limit: float,
    space: Flat,
    votes: Votes | None = None,
) -> GroupMean:
    """Create the mean that the run description names for a group; the arguments are those of `GroupSetup`."""
    segments = weight_segments(run, manifest, group)
    layers = tuple((math.prod(shape), 0) for _, shape in manifest.groups[group])
    setup = GroupSetup(
        segments,
        weight_limit,
        layers=segments if len(segments) > 1 else layers,
        start=start,
        max_share=largest_share(run),
        usual=usual_size(run),
        trim=run.sharing.trim,
        space=space,
        votes=votes,
    )
    mean: GroupMean = MEANS.load(run.sharing.mean_of(group))(setup)
    return mean


def usual_size(run: RunConfig) -> float:
    """Size that few numbers of an update exceed: two learning rates per local step, about what AdamW moves a parameter
    at most; under site-level privacy a sixteenth of the clip norm."""
    if run.server_privacy:
        return run.server_privacy.clip_norm / 16.0
    return 2.0 * run.train.learning_rate * run.train.local_steps
