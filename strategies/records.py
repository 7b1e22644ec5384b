"""Flower's records to plain values and back, without copying arrays."""

import numpy as np
from flwr.app import Array, RecordDict

from panfm.errors import ProtocolError
from panfm.sharing.groups import Flat
from panfm.sharing.messages import Records, check_count, check_words
from panfm.sharing.npy import NpySpace, to_npy, view_npy


def unpack(content: RecordDict) -> Records:
    """What a reply of a site holds.

    Its arrays are views of the bytes, which are taken out of it: Flower's records refer to themselves, and would keep
    them until the collector comes.

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
    """The numbers of Flower's array: a view. Raises ProtocolError if its bytes are not what it says they are."""
    if array.stype != "numpy.ndarray":
        raise ProtocolError(f"array of type {array.stype!r:.40}, expected numpy.ndarray")
    return view_npy(array.data)  # type: ignore[return-value]


def make_array(flat: Flat) -> Array:
    """Flower's array of some numbers, in one copy."""
    return _wrap(flat.dtype, flat.shape, to_npy(flat))


def hand_over(space: NpySpace) -> Array:
    """Flower's array of the numbers of a space, without a copy; the space is closed."""
    dtype, shape = space.numbers.dtype, space.numbers.shape
    return _wrap(dtype, shape, space.close())


def _wrap(dtype: np.dtype[np.generic], shape: tuple[int, ...], data: bytes) -> Array:
    return Array(dtype=str(dtype), shape=shape, stype="numpy.ndarray", data=data)
