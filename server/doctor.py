"""What `python -m server doctor` checks of the coordinator's machine."""

import re
import ssl
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from panfm.certificates import certificate_end
from panfm.cli.machine_checks import (
    Finding,
    certificate_finding,
    check_closed,
    check_connection,
    check_disk,
    check_port,
    check_processes_hidden,
    check_rules,
    check_units,
)
from panfm.errors import PanfmError, one_line, reason

_UNITS = ("panfm-isolation@coordinator", "panfm-superlink", "panfm-superexec", "nginx")
_SECRETS = ("server.key", "superexec.secret")
_NOBODY = "nobody"
_CERTIFICATE = re.compile(r"notAfter=(?P<end>[^\n]+)\n.*?(?:DNS|IP Address):(?P<host>[^,\s]+)", re.DOTALL)


@dataclass(frozen=True)
class Places:
    """Where the parts of a coordinator are; the defaults are those of the shipped units."""

    config: Path = Path("/etc/panfm")
    state: Path = Path("/var/lib/panfm-coordinator")
    runs: Path = Path("/srv/panfm/runs")
    port: int = 8000
    """Of the SuperLink."""
    door: int = 443
    """Port of nginx, which publishes the fleet routes."""
    accounts: Sequence[str] = ("panfm-coordinator", "www-data")
    """That may connect to the SuperLink: its own, then nginx's."""


def coordinator_findings(places: Places) -> Iterator[Finding]:
    """Check isolation, rights, units, disk, certificates, and the door of a coordinator."""
    yield check_rules("coordinator", places.port, places.accounts)
    yield check_port(places.port, places.accounts)
    yield check_processes_hidden()
    outsiders = (_NOBODY, *places.accounts[1:])
    yield from (check_closed(places.config / name, outsiders, kind="secret") for name in _SECRETS)
    yield check_closed(places.config / "ca.key", outsiders, kind="secret", is_needed=False)
    yield check_closed(places.state, outsiders, kind="state")
    yield check_closed(places.runs, outsiders, kind="run folders")
    yield from check_units(_UNITS)
    for folder in (places.state, places.runs):
        yield check_disk(folder)
    authority, server = places.config / "ca.crt", places.config / "server.pem"
    try:
        yield certificate_finding(f"certificate {authority}", certificate_end(authority))
    except PanfmError as error:
        yield Finding("unknown", f"certificate {authority}", f"{error}; run this as root, or make it")
    words = _server_certificate(server)
    if isinstance(words, Finding):
        yield words
        return
    yield certificate_finding(f"certificate {server}", ssl.cert_time_to_seconds(words["end"]))
    yield from check_connection(words["host"], places.door, authority, connect_to="127.0.0.1")


def _server_certificate(path: Path) -> dict[str, str] | Finding:
    """End and first name of the server's certificate, as openssl tells them; a finding if it cannot be read."""
    subject = f"certificate {path}"
    command = ["openssl", "x509", "-in", str(path), "-noout", "-enddate", "-ext", "subjectAltName"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return Finding("unknown", subject, f"openssl cannot be asked ({reason(error)})")
    if told := _CERTIFICATE.search(done.stdout):
        return told.groupdict()
    why = one_line(done.stderr, 100) or "no DNS name"
    return Finding("unknown", subject, f"cannot be read ({why}); run this as root, or make it anew")
