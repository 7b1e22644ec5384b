"""Converts Flower's records to plain values and back."""

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from panfm.sharing.messages import Records
from panfm.sharing.npy import to_npy


def unpack(content: RecordDict) -> Records:
    """Read a message from the server into plain values."""
    arrays = {name: array.numpy() for record in content.array_records.values() for name, array in record.items()}
    config = {key: value for record in content.config_records.values() for key, value in record.items()}
    return Records(arrays=arrays, config=config)


def pack(records: Records) -> RecordDict:
    """Write a reply as Flower's records: one of each kind, as Flower's own strategies expect."""
    arrays = {
        name: Array(dtype=str(array.dtype), shape=array.shape, stype="numpy.ndarray", data=to_npy(array))
        for name, array in records.arrays.items()
    }
    return RecordDict(
        {
            "arrays": ArrayRecord(arrays),
            "metrics": MetricRecord(dict(records.metrics)),
            "config": ConfigRecord(dict(records.config)),
        }
    )
