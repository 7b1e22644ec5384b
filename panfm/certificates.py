"""Reads when certificates end."""

import ssl
from pathlib import Path

from panfm.errors import DataError


def certificate_end(path: Path) -> float:
    """The earliest end of the certificates in a PEM file, in seconds since the epoch.

    Raises:
        DataError: the file cannot be read, or holds no certificate.
    """
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or 'no certificate'}") from error
    ends = [ssl.cert_time_to_seconds(str(one["notAfter"])) for one in context.get_ca_certs() if "notAfter" in one]
    if not ends:
        raise DataError(f"{path}: no certificate authority")
    return min(ends)
