"""What `python -m server doctor` checks of the coordinator's machine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path

from cryptography import x509

from panfm.cli.doctor import (
    Finding,
    State,
    certificate_finding,
    check_closed,
    check_connection,
    check_disk,
    check_port,
    check_processes_hidden,
    check_rules,
    check_units,
)
from panfm.errors import reason

_UNITS = ("panfm-isolation@coordinator", "panfm-superlink", "panfm-superexec", "nginx")
_SECRETS = ("server.key", "superexec.secret")
_NOBODY = "nobody"


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
    yield from (check_closed(places.config / name, outsiders, what="secret") for name in _SECRETS)
    yield check_closed(places.config / "ca.key", outsiders, what="secret", is_needed=False)
    yield check_closed(places.state, outsiders, what="state")
    yield check_closed(places.runs, outsiders, what="run folders")
    yield from check_units(_UNITS)
    for folder in (places.state, places.runs):
        yield check_disk(folder)
    authority, server = places.config / "ca.crt", places.config / "server.pem"
    yield from (_certificate(path) for path in (authority, server))
    if host := _host(server):
        yield from check_connection(host, places.door, authority, connect_to="127.0.0.1")


def _certificate(path: Path) -> Finding:
    """Whether a certificate lasts."""
    try:
        end = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except (OSError, ValueError) as error:
        state: State = "unknown" if isinstance(error, PermissionError) else "FAULT"
        return Finding(state, f"certificate {path}", f"cannot be read ({reason(error)}); run this as root, or renew it")
    return certificate_finding(f"certificate {path}", end.astimezone(UTC).timestamp())


def _host(server: Path) -> str:
    """The first name of the server's certificate; empty where there is none, which `_certificate` has told."""
    try:
        certificate = x509.load_pem_x509_certificate(server.read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return ""
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return next(iter([*names.get_values_for_type(x509.DNSName), *addresses]), "")
