"""What `panfm site doctor` checks of a hospital's machine."""

import os
import pwd
from collections.abc import Iterator
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
from panfm.config import SiteConfig, site_path
from panfm.data.manifest import image_path, read_manifest
from panfm.errors import PanfmError, one_line, reason
from panfm.site.worker import is_running

_UNITS = ("panfm-isolation@site", "panfm-worker", "panfm-supernode")
_NOBODY = "nobody"


def site_findings(folder: Path, site: SiteConfig, port: int) -> Iterator[Finding]:
    """Check isolation, rights, units, worker, disk, certificate, connection and clock of a site.

    Args:
        port: On which the SuperNode hands messages to its ClientApps.
    """
    yield check_rules("site", port, site.worker.users)
    yield check_port(port, site.worker.users)
    yield check_processes_hidden()
    yield from _rights(folder, site)
    yield from check_units(_UNITS)
    is_at_work = is_running(folder, site)
    words = "is at work" if is_at_work else "is not at work; start panfm-worker, or panfm site start"
    yield Finding("ok" if is_at_work else "FAULT", "worker", words)
    yield check_disk(site_path(folder, site.state_dir))
    trusted = site_path(folder, site.coordinator.root_certificates)
    try:
        yield certificate_finding(f"certificate authority {trusted}", certificate_end(trusted))
    except PanfmError as error:
        yield Finding("FAULT" if os.geteuid() == 0 else "unknown", "certificate authority", f"{error}; see the kit")
    host, _, door = site.coordinator.address.rpartition(":")
    yield from check_connection(host, int(door), trusted)


def _rights(folder: Path, site: SiteConfig) -> Iterator[Finding]:
    """Key and socket are for Flower's account; data, state and ledger for the worker's."""
    flower, worker = site.worker.users, _owner(folder)
    strangers = (_NOBODY,) if worker in flower else (_NOBODY, worker)
    yield check_closed(site_path(folder, site.coordinator.key), strangers, kind="key")
    yield check_closed(site_path(folder, site.worker.socket), (_NOBODY,), kind="socket")
    outsiders = (_NOBODY, *flower)
    for kind, relative in (("state", site.state_dir), ("ledger", site.ledger_dir), ("cache", site.cache_dir)):
        yield check_closed(site_path(folder, relative), outsiders, kind=kind, is_needed=False)
    for kind, name in (("manifest", site.manifest), ("labels", site.labels)):
        if name:
            yield check_closed(site_path(folder, name), outsiders, kind=kind)
    yield _images(folder, site, outsiders)


def _images(folder: Path, site: SiteConfig, outsiders: tuple[str, ...]) -> Finding:
    """Whether all images of the manifest are closed to others; the first that is not is told by its folder alone."""
    try:
        rows = read_manifest(folder, site)
    except (PanfmError, OSError) as error:
        words = one_line(str(error), 120) if isinstance(error, PanfmError) else reason(error)
        return Finding("unknown", "images", f"the manifest cannot be read ({words}); see panfm site check")
    for row in rows:
        path = image_path(folder, site, row.path)
        finding = check_closed(path, outsiders, kind="images")
        if finding.state != "ok":
            return Finding(
                finding.state, f"images of {path.parent}", finding.words.replace(str(path), str(path.parent))
            )
    return Finding("ok", "images", f"all {len(rows)} closed to {', '.join(outsiders)}")


def _owner(folder: Path) -> str:
    number = folder.stat().st_uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
