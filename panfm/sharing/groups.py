"""Groups in which parameters are shared, and their packing into one array per group.

    stream:<s>   tokenizer and heads of stream s      averaged over the sites that hold stream s
    backbone     the shared network                   averaged over all sites
    director     directors of layers with experts     averaged over all sites
    experts      their experts                        private, or averaged over all sites expert by expert
    router       their routers                        as experts
    head         heads of all streams                 averaged over all sites, or private

A model's modules name their groups, and `PanModel.parameter_groups` gives the group of every parameter. `is_shared`
says which groups leave a site under a run's `[sharing]`.

A group travels as one flat float32 array: its parameters in the order of their sorted names. `GroupManifest` is that
layout; its hashes are compared in the handshake, so that both ends cut the array at the same places.
"""

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from panfm.config.sharing import SharingConfig
from panfm.errors import ProtocolError

Flat = NDArray[np.float32]
Layout = tuple[tuple[str, tuple[int, ...]], ...]
Segments = tuple[tuple[int, int], ...]
"""Runs of a packed group that share one weight: (how many numbers, which of the group's weights)."""
_Value = TypeVar("_Value")


class _Shaped(Protocol):
    """A tensor of any library."""

    @property
    def shape(self) -> tuple[int, ...]: ...


BACKBONE = "backbone"
HEAD = "head"
DIRECTOR = "director"
EXPERTS = "experts"
ROUTER = "router"
_STREAM = "stream:"
_PARTS_OF_LAYER = re.compile(rf"\.(?:{DIRECTOR}|{EXPERTS}|{ROUTER})\.")
"""A layer with experts holds them as attributes of these names."""


def stream_group(stream: str) -> str:
    """Group of one stream's parameters."""
    return _STREAM + stream


def stream_of(group: str) -> str | None:
    """The stream of a `stream:<s>` group; None for any other group."""
    return group.removeprefix(_STREAM) if group.startswith(_STREAM) else None


def has_group(trained: Collection[str], group: str, streams: Collection[str] = ()) -> bool:
    """Whether a site's model has a group, given the groups that the site trains and the streams that it holds: all but
    those of streams it lacks."""
    stream = stream_of(group)
    return group in trained or stream is None or stream in streams


def layer_of(name: str) -> str:
    """Path of the layer of a director's, expert's or router's parameter, such as `backbone.blocks.<i>.mlp`.

    Raises:
        ProtocolError: the parameter is of none of these.
    """
    layer, *parts = _PARTS_OF_LAYER.split(name, maxsplit=1)
    if not parts:
        raise ProtocolError(f"parameter {name!r:.80}: in no layer with experts, expected director, experts or router")
    return layer


def is_shared(sharing: SharingConfig, group: str) -> bool:
    """Whether a group leaves its site; if not, server and other sites never hold it.

    Raises:
        ProtocolError: there is no such group.
    """
    if group in (EXPERTS, ROUTER):
        return sharing.experts != "private"
    if group == HEAD:
        return sharing.head != "private"
    if group not in (BACKBONE, DIRECTOR) and not stream_of(group):
        raise ProtocolError(f"unknown group {group!r}, expected backbone, director, experts, router, head or stream:*")
    return True


def parameter_hashes(groups: Mapping[str, Flat]) -> dict[str, str]:
    """Group -> SHA-256 of its packed parameters."""
    return {group: hashlib.sha256(np.ascontiguousarray(flat).data).hexdigest() for group, flat in groups.items()}


def split_state(
    sharing: SharingConfig, groups: Mapping[str, str], state: Mapping[str, _Value]
) -> tuple[dict[str, _Value], dict[str, _Value]]:
    """A model's state in two, by name: what is shared, and what stays at the site.

    Args:
        groups: Parameter -> its group, of the model.
    Raises:
        ProtocolError: a parameter of the state has no group.
    """
    shared = {name: value for name, value in state.items() if is_shared(sharing, group_of(groups, name))}
    return shared, {name: value for name, value in state.items() if name not in shared}


def group_of(groups: Mapping[str, str], name: str) -> str:
    """Group of a parameter. Raises ProtocolError if it has none, so that it must not be shared."""
    if name not in groups:
        raise ProtocolError(f"parameter {name!r} belongs to no group: the model has no such parameter")
    return groups[name]


@dataclass(frozen=True)
class GroupManifest:
    """Group -> its parameters, in packing order.

    Guarantees:
        round trip: `unpack(group, pack(group, tensors))` gives the group's tensors back bit for bit.
    """

    groups: Mapping[str, Layout]

    @classmethod
    def of(cls, groups: Mapping[str, str], tensors: Mapping[str, _Shaped]) -> Self:
        """Sort parameters into their groups.

        Args:
            groups: Parameter -> its group, of the model.
            tensors: The parameters that the manifest shall have.
        Raises:
            ProtocolError: a parameter has no group.
        """
        layouts: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for name in sorted(tensors):
            layouts.setdefault(group_of(groups, name), []).append((name, tuple(tensors[name].shape)))
        return cls({group: tuple(layouts[group]) for group in sorted(layouts)})

    def size(self, group: str) -> int:
        """Numbers in a packed group."""
        return sum(math.prod(shape) for _, shape in self.groups[group])

    def experts(self, group: str) -> tuple[tuple[str, int], ...]:
        """The experts in a group of stacked tensors [R, ...], in order: (layer, index in the layer)."""
        return tuple(sorted({(layer_of(name), row) for name, shape in self.groups[group] for row in range(shape[0])}))

    def segments(self, group: str) -> Segments:
        """Owner of every number in a packed group of stacked tensors, as indices into `experts(group)`."""
        place = {expert: index for index, expert in enumerate(self.experts(group))}
        return tuple(
            (math.prod(shape[1:]), place[layer_of(name), row])
            for name, shape in self.groups[group]
            for row in range(shape[0])
        )

    def hashes(self) -> dict[str, str]:
        """Group -> hex digest of its layout."""
        return {
            group: hashlib.sha256(json.dumps(layout).encode()).hexdigest()[:16] for group, layout in self.groups.items()
        }

    def pack(self, group: str, tensors: Mapping[str, NDArray[np.float32]], minus: Flat | None = None) -> Flat:
        """Pack a group into one flat float32 array.

        Args:
            minus: A packed group that is subtracted.
        Raises:
            ProtocolError: a parameter is missing, has another shape, or is not float32.
        """
        flat = np.empty(self.size(group), dtype=np.float32)
        start = 0
        for name, shape in self.groups[group]:
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != shape or tensor.dtype != np.float32:
                given = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise ProtocolError(f"{group}: {name} is {given}, expected float32 {list(shape)}")
            part = slice(start, start := start + tensor.size)
            np.subtract(tensor.reshape(-1), 0 if minus is None else minus[part], out=flat[part])
        return flat

    def pack_all(self, tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, Flat]:
        """Pack every group."""
        return {group: self.pack(group, tensors) for group in self.groups}

    def unpack(self, group: str, flat: Flat) -> dict[str, NDArray[np.float32]]:
        """The group's parameters, as views of `flat`. Raises ProtocolError if size or dtype differs."""
        if flat.shape != (self.size(group),) or flat.dtype != np.float32:
            given = f"{flat.dtype} {list(flat.shape)}"
            raise ProtocolError(f"{group}: got {given}, expected float32 [{self.size(group)}]")
        tensors = {}
        start = 0
        for name, shape in self.groups[group]:
            stop = start + math.prod(shape)
            tensors[name] = flat[start:stop].reshape(shape)
            start = stop
        return tensors

    def unpack_all(self, flats: Mapping[str, Flat]) -> dict[str, NDArray[np.float32]]:
        """The parameters of every group. Raises ProtocolError for an unknown or missing group."""
        self.check_known(flats)
        if missing := sorted(set(self.groups) - set(flats)):
            raise ProtocolError(f"missing group {missing[0]!r}")
        return {name: tensor for group in flats for name, tensor in self.unpack(group, flats[group]).items()}

    def check_known(self, groups: Iterable[str]) -> None:
        """Raises ProtocolError if a group is not in the manifest."""
        if unknown := sorted(set(groups) - set(self.groups)):
            raise ProtocolError(f"unknown group {unknown[0]!r}, known: {', '.join(self.groups)}")
