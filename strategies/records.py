"""Flower's records to plain values."""

from flwr.app import RecordDict

from panfm.errors import ProtocolError
from panfm.sharing.messages import Records


def unpack(content: RecordDict) -> Records:
    """What a reply of a site holds. Raises ProtocolError if its bytes are not arrays."""
    try:
        arrays = {name: array.numpy() for record in content.array_records.values() for name, array in record.items()}
    except Exception as error:
        raise ProtocolError(f"arrays cannot be read ({type(error).__name__})") from error
    metrics = {key: value for record in content.metric_records.values() for key, value in record.items()}
    config = {key: value for record in content.config_records.values() for key, value in record.items()}
    return Records(arrays=arrays, metrics=metrics, config=config)  # type: ignore[arg-type]
