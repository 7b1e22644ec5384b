"""Settings of the step from a round's updates to the next global model: guards, mean, optimiser, group by group."""

from typing import Annotated, Literal

from pydantic import Field

from panfm.config.base import BelowOne, Config, Uncoupled, plug_in
from panfm.registry import MEANS

Mean = Annotated[str, plug_in(MEANS)]
GroupName = Annotated[str, Field(pattern=r"^(backbone|head|director|experts|router|stream(:[a-z0-9._-]+)?)$")]
NormLimit = Annotated[float, Field(ge=1e-3, le=1e6)]
ServerRate = Annotated[float, Field(ge=1e-9, le=10.0)]


class GuardsConfig(Config):
    """Bounds on a site's update. An update beyond one is refused and logged; the round goes on without it."""

    norm_limit: NormLimit = 1.5
    """Greatest root mean square of a group's update, in units of the sum of the round's learning rates (of directors:
    of a round at the full rate): AdamW moves a number by about 1 of these in a round, or less."""
    norm_ratio: Annotated[float, Field(gt=1.0, le=1e6)] = 3.0
    """Greatest norm of a group's update, as a multiple of what was usual for the other sites in the last ten rounds;
    ten times as much until two other sites have trained the group in two rounds. One longer than a third of this
    multiple of what was usual in the last three, at the same learning rate, is shortened to it."""
    direction: Annotated[float, Field(gt=0.0, le=2.0)] | None = None
    """Refuse an update whose cosine with the last round's updates lies further than this from the usual one, as a
    sign-flipped one may (strategies/reply_guards.py tells when). Needs four sites. 0.4 when left out. 2 refuses none: a
    federation of a hundred or more small, unlike sites needs it, as 0.4 refused honest ones. Not under `[site-dp]`."""


class PlainStepConfig(Config):
    """Add the mean update to the global parameters."""

    kind: Literal["none"] = "none"


class MomentumConfig(Config):
    """FedAvgM (arXiv 1909.06335); with Nesterov's look-ahead, DiLoCo's outer step (arXiv 2311.08105, there with
    learning rate 0.7). Momentum 0 and learning rate 1 - m is a running mean of the sites' models with momentum m: on
    the group `director`, GEMA over the federation."""

    kind: Literal["momentum"]
    learning_rate: ServerRate = 1.0
    """The server's step is this times the momentum step."""
    momentum: BelowOne = 0.9
    """Each round, the running sum of mean updates is multiplied by this before the new mean update is added."""
    nesterov: bool = True
    """Whether the momentum step is the mean update plus momentum times the running sum (true), or the sum (false)."""


class AdaptiveConfig(Config):
    """FedAdam and FedYogi (arXiv 2003.00295, Algorithm 2)."""

    kind: Literal["adam", "yogi"]
    learning_rate: ServerRate = 0.01
    """About what a number moves in a round."""
    betas: Annotated[tuple[BelowOne, BelowOne], Field(strict=False)] = (0.9, 0.99)
    """Decay rates of the running means of updates and of their squares."""
    epsilon: Annotated[float, Field(ge=1e-12, le=1e3)] = 1e-3
    """The paper's tau: an update that is small against it moves little."""


OptimiserConfig = Annotated[PlainStepConfig | MomentumConfig | AdaptiveConfig, Field(discriminator="kind")]


class GroupConfig(Config):
    """Settings of one group; keys left out are as in `[sharing]`."""

    mean: Mean | None = None
    optimiser: OptimiserConfig | None = None
    norm_limit: NormLimit | None = None
    """Norm limit of this group's updates, instead of `sharing.guards.norm-limit`."""


class SharingConfig(Uncoupled):
    """Settings of the server's mean, guards and optimiser."""

    rule: Literal["grouped", "plain"] = "grouped"
    """grouped: each group over the sites that trained it, by how much; plain: everything from everyone (baseline)."""
    experts: Literal["private", "pooled", "naive"] = "private"
    """What becomes of experts and router. private: they never leave the site; pooled: mean per expert, by gate mass;
    naive: mean of all, by subjects (baseline)."""
    head: Literal["mean", "private"] = "mean"
    """mean: averaged as the backbone is; private: it never leaves the site."""
    coding: Literal["float32", "bf16", "int8"] = "float32"
    """How a site's updates travel: 4, 2 or 1 bytes a number. What rounding loses, the site adds to its next update."""
    mean: Mean = "weighted"
    """weighted: by how much each site trained the group. median, trimmed: number by number, one vote per site (arXiv
    1803.01498). geometric-median: weighted, of whole groups (arXiv 1912.13445). l-dawa: weighted, and within a group
    each layer by the cosine between the site's and the global parameters (arXiv 2307.07393). median, trimmed and
    geometric-median keep all updates of a round in memory."""
    trim: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.2
    """Share of the sites that `trimmed` cuts off at each end, rounded up."""
    optimiser: OptimiserConfig = PlainStepConfig()
    """What the server makes of the mean update."""
    guards: GuardsConfig = GuardsConfig()
    groups: dict[GroupName, GroupConfig] = Field(default_factory=dict)
    """Differences by group: a group's name, or `stream` for all streams."""

    def mean_of(self, group: str) -> Mean:
        """The mean of one group."""
        return next((table.mean for table in self._for(group) if table.mean), self.mean)

    def optimiser_of(self, group: str) -> PlainStepConfig | MomentumConfig | AdaptiveConfig:
        """The optimiser of one group."""
        return next((table.optimiser for table in self._for(group) if table.optimiser), self.optimiser)

    def norm_limit_of(self, group: str) -> float:
        """The norm limit of one group."""
        return next((table.norm_limit for table in self._for(group) if table.norm_limit), self.guards.norm_limit)

    def _for(self, group: str) -> list[GroupConfig]:
        """Tables that apply to a group, its own before that of all streams."""
        names = dict.fromkeys((group, group.partition(":")[0]))
        return [self.groups[name] for name in names if name in self.groups]
