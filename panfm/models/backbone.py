"""The interface of a backbone: tokens with a layout in, encoded tokens and CLS out.

To add one, write a subclass of `Backbone` in a file of its own and a line in `BACKBONES` (panfm/registry.py).

A module that starts a sharing group says so by a class attribute `sharing_group`. Everything within it belongs to that
group, unless a module further inside says otherwise. None means: only modules further inside may hold parameters.

Shape legend: B subjects, L = 1 + N tokens (CLS first), U units that are routed (subjects), R experts, K active experts,
D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from panfm.anatomy import stream_of_module
from panfm.data.store import Batch, send
from panfm.errors import ConfigError, ProtocolError
from panfm.models.tokens import Layout
from panfm.sharing.groups import BACKBONE, stream_group

Saliency = Literal["attention", "value"]
Route = Literal["experts", "director"]
"""Whether a forward pass goes through the experts or through the directors; a dense block has one route."""


@dataclass(frozen=True)
class Exploration:
    """Noise on the router's logits, for training only."""

    scale: float
    draw: Callable[[Tensor], Tensor]
    """Logits [U, R] of the next layer -> standard normal noise of their shape."""

    @classmethod
    def of(cls, scale: float, generator: torch.Generator) -> Self:
        """Draw the noise from a generator."""
        return cls(scale, lambda x: send(torch.randn(x.shape, generator=generator), x.device).to(x.dtype))

    def once(self) -> Self:
        """The noise of one layer, which is the same when the layer is computed again."""
        drawn: list[Tensor] = []

        def draw(x: Tensor) -> Tensor:
            drawn.extend([] if drawn else [self.draw(x)])
            return drawn[0]

        return replace(self, draw=draw)


@dataclass(frozen=True)
class Routed:
    """Routing of a batch by one layer, and the tensors that the layer's losses need."""

    probs: Tensor
    """[U, R] probabilities of the experts, noise included."""
    chosen: Tensor
    """int64 [U, K] experts of each unit, the most probable first."""
    gates: Tensor
    """[U, K] their weights, which sum to 1."""
    inputs: Tensor
    """[B, L, D], without gradient."""
    outputs: Tensor
    """[B, L, D], the experts' mixed outputs."""

    def mass(self) -> Tensor:
        """Sum the gates of every expert [R]; the sums add up to the number of units."""
        empty = self.gates.new_zeros(self.probs.shape[1])
        return empty.index_add(0, self.chosen.flatten(), self.gates.detach().flatten())


@dataclass(frozen=True)
class Encoded:
    """A batch that a backbone has encoded."""

    cls: Tensor
    """[B, D], after the last norm."""
    tokens: Tensor
    """[B, N, D], after the last norm; padded rows hold no meaning."""
    layout: Layout
    blocks: tuple[Tensor, ...]
    """Token outputs [B, N, D] of every block, before the last norm; empty unless asked for."""
    saliency: Tensor | None
    """[B, N] share of the CLS token's attention, sums to 1 over a subject's tokens; None unless asked for."""
    routed: tuple[Routed, ...] = ()
    """Routing of every layer with experts; empty unless the batch went through experts."""
    block_cls: tuple[Tensor, ...] = ()
    """CLS output [B, D] of every block, as `blocks`; empty for a backbone whose blocks have none."""


class Backbone(nn.Module, ABC):
    """Encodes the tokens of a batch. Subclasses are built with `(width, depth, heads, config)`.

    A class that private runs may use declares what couples patients in it, by a static method
    `couplings(config: ModelConfig) -> Iterator[str]` that yields `key: why, remedy`, one line each.
    """

    sharing_group = BACKBONE
    sharing_groups: ClassVar[frozenset[str]] = frozenset({BACKBONE})
    """Groups of all its parameters: its own, and those that its modules name."""
    has_saliency = False
    """Whether `forward` can tell what the CLS token attends to. Masking guided by saliency needs it."""

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        *,
        saliency: Saliency | None = None,
        keep_blocks: bool = False,
        route: Route = "experts",
        exploration: Exploration | None = None,
    ) -> Encoded:
        """Encode tokens [B, N, D]. Padding is never attended to; a subject with no token is its CLS alone.

        Args:
            saliency: Kind of saliency to compute; only asked for if `has_saliency`.
            keep_blocks: Whether to return the outputs of all blocks.
            route: Through the experts or through the directors alone.
            exploration: Noise for the routers, in training.
        """

    def turn_by(self, angles: Tensor) -> None:
        """Turn queries and keys of every patch by angles [M, d]. Raises ConfigError if the backbone cannot."""
        raise ConfigError('model.positions: this backbone knows no "rotary", expected "fixed" or "learned"')

    def recompute(self) -> None:
        """Keep each block's input alone for the backward pass. Raises ConfigError if the backbone cannot."""
        raise ConfigError('train.activations: this backbone knows no "recomputed", expected "kept"')

    @abstractmethod
    def last_layers(self, count: int) -> list[nn.Module]:
        """Return the last `count` layers and what follows them."""

    @abstractmethod
    def numbers_per_token(self) -> list[int]:
        """Count, layer by layer, the numbers that are filled per token: for the estimate of a step's memory."""

    def see(self, features: Batch) -> None:
        """Look at a batch's whole images before `forward` gets their visible tokens; does nothing by default."""


class PerStream(nn.ModuleDict):
    """Modules by `module_name` of their stream; a module belongs to the sharing group of its stream."""


def parameter_groups(model: nn.Module) -> dict[str, str]:
    """Sharing group of every tensor in a model's state dict, by its name.

    Raises:
        ProtocolError: no module around a parameter names a group, so it must not be shared.
    """
    tags: dict[str, str | None] = {}
    for path, module in model.named_modules():
        if hasattr(module, "sharing_group"):
            tags[path] = module.sharing_group
        if isinstance(module, PerStream):
            tags |= {f"{path}.{name}": stream_group(stream_of_module(name)) for name in module}
    return {name: _innermost_tag(name, tags) for name in model.state_dict()}


def _innermost_tag(name: str, tags: dict[str, str | None]) -> str:
    path = name.rpartition(".")[0]
    while path and path not in tags:
        path = path.rpartition(".")[0]
    group = tags.get(path)
    if group is None:
        raise ProtocolError(f"parameter {name!r} belongs to no group: no module around it has a sharing_group")
    return group
