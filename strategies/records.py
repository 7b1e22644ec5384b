"""Flower's records to plain values and back, without copying arrays."""

from flwr.app import Array, RecordDict

from panfm.errors import ProtocolError
from panfm.sharing.groups import Flat
from panfm.sharing.messages import Records
from panfm.sharing.npy import to_npy, view_npy


def unpack(content: RecordDict) -> Records:
    """What a reply of a site holds.

    Its arrays are views of the bytes, which are taken out of it: Flower's records refer to themselves, and would keep
    them until the collector comes.

    Raises:
        ProtocolError: the bytes are not arrays.
    """
    arrays = {}
    for record in content.array_records.values():
        for name in list(record):
            arrays[name] = view_array(record.pop(name))
    metrics = {key: value for record in content.metric_records.values() for key, value in record.items()}
    config = {key: value for record in content.config_records.values() for key, value in record.items()}
    return Records(arrays=arrays, metrics=metrics, config=config)  # type: ignore[arg-type]


def view_array(array: Array) -> Flat:
    """The numbers of Flower's array: a view. Raises ProtocolError if its bytes are not what it says they are."""
    if array.stype != "numpy.ndarray":
        raise ProtocolError(f"array of type {array.stype!r:.40}, expected numpy.ndarray")
    return view_npy(array.data)  # type: ignore[return-value]


def make_array(flat: Flat) -> Array:
    """Flower's array of some numbers, in one copy."""
    return Array(dtype=str(flat.dtype), shape=flat.shape, stype="numpy.ndarray", data=to_npy(flat))
