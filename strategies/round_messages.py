"""Draws the sites of a round and packs their messages; converts Flower's records to plain values and back."""

from collections.abc import Mapping
from functools import cached_property

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from panfm.config.federation import FederationConfig
from panfm.errors import ProtocolError
from panfm.seeds import numpy_generator
from panfm.sharing.coding import SCALE, Arrays, Coding, digests, encode_with_feedback
from panfm.sharing.groups import Flat, GroupManifest, has_group
from panfm.sharing.messages import (
    Handshake,
    Records,
    check_count,
    check_words,
    digest_words,
    frozen_name,
    teacher_name,
)
from panfm.sharing.npy import NpySpace, to_npy, view_npy
from strategies.server_step import Memory


def draw_sites(
    federation: FederationConfig, seed: int, roster: Mapping[int, Handshake], round_number: int
) -> dict[int, Handshake]:
    """Draw `participation` of the sites, at least `min-sites`, in the order of the roster.

    Guarantees:
        repeatable: the draw depends on the run's seed, the round and the names of the sites, nothing else.
    """
    num = max(federation.min_sites, round(federation.participation * len(roster)))
    if num >= len(roster):
        return dict(roster)
    names = sorted(handshake.site for handshake in roster.values())
    drawn = set(numpy_generator(seed, "participation", round_number).choice(names, num, replace=False).tolist())
    return {node_id: handshake for node_id, handshake in roster.items() if handshake.site in drawn}


class Downlink:
    """Contents of one round's messages: the last step for sites that have its start, all parameters for the others.

    Every array is packed once and shared by all messages that hold it.
    """

    def __init__(
        self,
        groups: ArrayRecord,
        memory: Memory,
        *,
        teacher: Mapping[str, Flat],
        frozen: Mapping[str, Flat] | None = None,
    ) -> None:
        """Pack the arrays of a round.

        Args:
            groups: Global parameters.
            memory: Holds the last step, and which sites have the parameters it starts from and those not trained.
            teacher: Group -> where teachers start; empty if they do not start at the server's EMA.
            frozen: Group -> its parameters that the run does not train.
        """
        self.bytes: dict[str, int] = {}
        """Group -> bytes sent so far, over all sites."""
        self.site_bytes: dict[str, int] = {}
        """Site -> bytes sent to it so far."""
        self._holders = frozenset(memory.holders)
        self._whole = {group: (array, view_array(array).nbytes) for group, array in groups.items()}
        self._step = _packed(memory.step)
        self._teacher = _packed({teacher_name(group): flat for group, flat in teacher.items()})
        self._frozen = frozen or {}
        self._frozen_holders = frozenset(memory.frozen_holders)
        self._digests = digests({group: view_array(array) for group, array in groups.items()}) if memory.holders else {}

    def content(self, handshake: Handshake, config: ConfigRecord) -> RecordDict:
        """Content of the message to one site, with the groups it trains."""
        is_holder = handshake.site in self._holders
        arrays = (self._step if is_holder else self._whole) | self._teacher
        sent = {name: packed for name, packed in arrays.items() if name.partition("/")[0] in handshake.group_hashes}
        if handshake.site not in self._frozen_holders:
            sent |= {
                frozen_name(group): packed
                for group, packed in self._packed_frozen.items()
                if has_group(handshake.group_hashes, group, handshake.streams)
            }
        for name, (_, size) in sent.items():
            group = name.partition("/")[0]
            self.bytes[group] = self.bytes.get(group, 0) + size
            self.site_bytes[handshake.site] = self.site_bytes.get(handshake.site, 0) + size
        if is_holder:
            words = digest_words({group: self._digests[group] for group in handshake.group_hashes})
            config = ConfigRecord({**config, **words})
        return RecordDict({"arrays": ArrayRecord({name: array for name, (array, _) in sent.items()}), "config": config})

    @cached_property
    def _packed_frozen(self) -> dict[str, tuple[Array, int]]:
        """Packed when the first site that lacks it is asked: in most rounds none does."""
        return _packed(self._frozen)


def _packed(arrays: Arrays) -> dict[str, tuple[Array, int]]:
    """Name -> packed array, and its bytes."""
    return {name: (make_array(array), array.nbytes) for name, array in arrays.items()}


def unpack(content: RecordDict) -> Records:
    """Turn a site's reply into plain values.

    Its arrays become views of the bytes and are removed from the content: Flower's records refer to themselves, and
    would keep them until the garbage collector runs.

    Raises:
        ProtocolError: the bytes are not arrays, or there are more or longer words than a site has to say.
    """
    check_count(sum(map(len, content.values())))
    arrays = {}
    for record in content.array_records.values():
        for name in list(record):
            arrays[name] = view_array(record.pop(name))
    metrics = {key: value for record in content.metric_records.values() for key, value in record.items()}
    config = {key: value for record in content.config_records.values() for key, value in record.items()}
    records = Records(arrays=arrays, metrics=metrics, config=config)  # type: ignore[arg-type]
    check_words(records)
    return records


def view_array(array: Array) -> Flat:
    """View the numbers of Flower's array. Raises ProtocolError if its bytes are not what it says they are."""
    if array.stype != "numpy.ndarray":
        raise ProtocolError(f"array of type {array.stype!r:.40}, expected numpy.ndarray")
    return view_npy(array.data)  # type: ignore[return-value]


def view_arrays(arrays: Mapping[str, Array]) -> dict[str, Flat]:
    """View the numbers of several arrays, as `view_array`."""
    return {name: view_array(array) for name, array in arrays.items()}


def make_array(flat: Flat) -> Array:
    """Copy numbers into Flower's array, once."""
    return _wrap(flat.dtype, flat.shape, to_npy(flat))


def hand_over(space: NpySpace) -> Array:
    """Turn the numbers of a space into Flower's array, without a copy; the space is closed."""
    dtype, shape = space.numbers.dtype, space.numbers.shape
    return _wrap(dtype, shape, space.close())


def _wrap(dtype: np.dtype[np.generic], shape: tuple[int, ...], data: bytes) -> Array:
    return Array(dtype=str(dtype), shape=shape, stype="numpy.ndarray", data=data)


def bytes_per_group(arrays: Arrays) -> dict[str, int]:
    """Group -> bytes of its arrays, scales included."""
    total: dict[str, int] = {}
    for name, array in arrays.items():
        group = name.removesuffix(SCALE)
        total[group] = total.get(group, 0) + array.nbytes
    return total


def code_step(
    coding: Coding, manifest: GroupManifest, group: str, step: Flat, lost: Mapping[str, Flat]
) -> tuple[Arrays, dict[str, Flat]]:
    """Code a group's step; also returns its rounding error.

    Args:
        step: float32 [size]; -0.0 where nobody trained, which then loses nothing and makes up for nothing.
        lost: Group -> what the step before lost; nothing for a group that lost nothing.
    """
    idle = (step == 0) & np.signbit(step)
    owed = {group: np.where(idle, np.float32(0.0), lost[group])} if group in lost else {}
    arrays, loses = encode_with_feedback(coding, manifest, {group: step}, owed)
    if group in lost:
        loses[group][idle] = lost[group][idle]
    return arrays, loses
