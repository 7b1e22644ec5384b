"""Converts Flower's records to plain values and back."""

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from panfm.sharing.messages import Records
from panfm.sharing.npy import to_npy

ASKED_AGAIN = "asked-again"
"""Record of a reply by which the server learns that the worker went away, or was not there, when it was asked."""
SITE_ERROR = 1000
"""Code of our own error replies; Flower's are below 100."""


def unpack(content: RecordDict) -> Records:
    """Read a message from the server into plain values."""
    arrays = {name: array.numpy() for record in content.array_records.values() for name, array in record.items()}
    config = {key: value for record in content.config_records.values() for key, value in record.items()}
    return Records(arrays=arrays, config=config)


def pack(records: Records, *, asked_again: bool = False) -> RecordDict:
    """Write a reply as Flower's records: one of each kind, as Flower's own strategies expect.

    Args:
        asked_again: The worker went away, or was not there, when it was asked, which the server is told.
    """
    arrays = {
        name: Array(dtype=str(array.dtype), shape=array.shape, stype="numpy.ndarray", data=to_npy(array))
        for name, array in records.arrays.items()
    }
    content = RecordDict(
        {
            "arrays": ArrayRecord(arrays),
            "metrics": MetricRecord(dict(records.metrics)),
            "config": ConfigRecord(dict(records.config)),
        }
    )
    if asked_again:
        content[ASKED_AGAIN] = MetricRecord()
    return content
