"""The weight of a site in the mean of a group.

    stream:S          subjects of the site that hold S; nothing if no local step was done
    director          gate mass of all experts of all layers
    experts, router   pooled: one weight per expert, its gate mass
    everything else   subjects trained x local steps done

Under site-level privacy (`[site-dp]`) every site weighs 1 in every group that it trains, whatever it did.

An image's gates sum to 1 in each layer, so a layer's gate mass is the number of images that steps were made of. Both
ends use this file: the site for the weights it sends, the server for the most it may send, given its handshake.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from panfm.config.sharing import SharingConfig
from panfm.config.site_dp import SiteDpConfig
from panfm.config.training import TrainConfig
from panfm.sharing.groups import DIRECTOR, EXPERTS, ROUTER, GroupManifest, Segments, layer_of, stream_of

Weights = tuple[float, ...]
"""One weight, or one per expert of the group."""
ROUNDING = 1.001
"""Gates sum to 1 as well as float32 can."""


@dataclass(frozen=True)
class Trained:
    """Subjects, steps and gate mass of a site's round."""

    subjects: int
    subjects_per_stream: Mapping[str, int]
    num_steps: int
    """Local steps done, skipped ones not counted."""
    gate_mass: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Layer -> gate mass of each of its experts."""


class GroupWeights:
    """Weights of a site in the groups of a run: what it states, and the most that it may state."""

    def __init__(
        self, sharing: SharingConfig, train: TrainConfig, site_dp: SiteDpConfig | None, manifest: GroupManifest
    ) -> None:
        self.sharing, self.manifest = sharing, manifest
        self._train, self._site_dp = train, site_dp

    def weights(self, group: str, trained: Trained) -> Weights:
        """Weights of one site in one group."""
        if self._site_dp is not None:
            return (1.0,)
        if self.is_pooled(group):
            return tuple(trained.gate_mass[layer][index] for layer, index in self.manifest.experts(group))
        if self._is_by_gates(group):
            return (sum(sum(trained.gate_mass[layer]) for layer in self.layer_names(group)),)
        return self._plain_weights(group, trained)

    def limits(self, group: str, *, subjects: int, subjects_per_stream: Mapping[str, int]) -> Weights:
        """Largest weights that a site may have in a group, by the numbers it gave before round 1."""
        if self._site_dp is not None:
            return (1.0,)
        images = self.most_images(subjects)
        if self.is_pooled(group):
            return (images,) * len(self.manifest.experts(group))
        if self._is_by_gates(group):
            return (images * len(self.layer_names(group)),)
        return self._plain_weights(group, Trained(subjects, subjects_per_stream, self._train.local_steps))

    def segments(self, group: str) -> Segments:
        """Segments of a packed group: (numbers, index of the site's weight that counts for them)."""
        return self.manifest.segments(group) if self.is_pooled(group) else ((self.manifest.size(group), 0),)

    def layers(self, group: str) -> Segments:
        """Segments of a packed group, one per parameter, or per expert of one: (numbers, index of its weight)."""
        if self.is_pooled(group):
            return self.manifest.segments(group)
        return tuple((math.prod(shape), 0) for _, shape in self.manifest.groups[group])

    def is_pooled(self, group: str) -> bool:
        """Whether every expert of the group has a weight of its own."""
        return group in (EXPERTS, ROUTER) and self.sharing.experts == "pooled" and self.sharing.rule == "grouped"

    def _is_by_gates(self, group: str) -> bool:
        return group == DIRECTOR and self.sharing.rule == "grouped"

    def most_images(self, subjects: int) -> float:
        """Most images that a round's batches hold at a site."""
        return ROUNDING * min(subjects, self._train.batch_size) * self._train.local_steps

    def layer_names(self, group: str) -> list[str]:
        """Names of the layers that a group has parameters of."""
        return sorted({layer_of(name) for name, _ in self.manifest.groups[group]})

    def _plain_weights(self, group: str, trained: Trained) -> Weights:
        """Weight by subjects; under the `plain` rule a stream's group weighs as any other."""
        stream = stream_of(group)
        if stream is None or self.sharing.rule == "plain":
            return (float(trained.subjects * trained.num_steps),)
        return (float(trained.subjects_per_stream.get(stream, 0)) if trained.num_steps else 0.0,)
