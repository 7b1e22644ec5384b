"""Metrics of a site in Prometheus' text format, for the hospital's own monitoring; the worker does without them."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from panfm.certificates import certificate_end
from panfm.cli.request_lines import Experiments
from panfm.cli.site_health import free_bytes, last_error
from panfm.config import SiteConfig, site_path
from panfm.config.site_description import LimitsConfig
from panfm.errors import PanfmError
from panfm.report.prometheus import Sample, prometheus_text
from panfm.site.approvals import check_approved
from panfm.site.audit_log import AuditLog
from panfm.site.patient_budget import PatientBudget
from panfm.site.worker import is_running

METRICS = {
    "panfm_site_worker_at_work": ("gauge", "1 while the worker is at work, else 0"),
    "panfm_site_limit": ("gauge", "limits in force that are numbers, in the unit of site.toml"),
    "panfm_site_may_leave": ("gauge", "1 for each kind of content that may leave"),
    "panfm_site_record_holds": ("gauge", "1 if a record is whole and not tampered with, else 0; 0 stops rounds"),
    "panfm_site_experiments_approved": ("gauge", "experiments whose approval is in force"),
    "panfm_site_approvals_waiting": ("gauge", "experiments that wait for the operator's decision"),
    "panfm_site_messages_total": ("counter", "messages that left the site"),
    "panfm_site_last_contact_timestamp_seconds": ("gauge", "time of the last message, in seconds since the epoch"),
    "panfm_site_last_error_timestamp_seconds": ("gauge", "time of the last error, in seconds since the epoch"),
    "panfm_site_disk_free_bytes": ("gauge", "free bytes on the disk of the state folder"),
    "panfm_site_certificate_end_timestamp_seconds": (
        "gauge",
        "end of the coordinator's certificate authority, in seconds since the epoch",
    ),
    "panfm_site_epsilon_spent": ("gauge", "epsilon that private rounds have spent on these patients"),
    "panfm_site_epsilon_limit": ("gauge", "epsilon of site.toml, else of the last private round"),
}
"""Name -> kind, and meaning with its unit."""


def site_metrics_text(folder: Path, site: SiteConfig) -> str:
    """All metrics of a site. What is not known, such as the end of a certificate that cannot be read, is left out."""
    return prometheus_text(METRICS, _samples(folder, site), {"site": site.name})


def _samples(folder: Path, site: SiteConfig) -> Iterator[Sample]:
    state_dir = site_path(folder, site.state_dir)
    yield "panfm_site_worker_at_work", {}, is_running(folder, site)
    yield from _limits(site.limits)
    for record, read in (("audit-log", _messages), ("approvals", _approvals), ("ledger", _epsilon)):
        try:
            samples = list(read(folder, site))
        except PanfmError:
            samples = []
            yield "panfm_site_record_holds", {"record": record}, 0
        else:
            yield "panfm_site_record_holds", {"record": record}, 1
        yield from samples
    if (error := _time(last_error(state_dir) or "")) is not None:
        yield "panfm_site_last_error_timestamp_seconds", {}, error
    yield "panfm_site_disk_free_bytes", {}, free_bytes(state_dir)
    try:
        end = certificate_end(site_path(folder, site.coordinator.root_certificates))
    except PanfmError:
        return
    yield "panfm_site_certificate_end_timestamp_seconds", {}, end


def _limits(limits: LimitsConfig) -> Iterator[Sample]:
    table = limits.model_dump(mode="json", by_alias=True, exclude_none=True)
    for key, value in table.items():
        if isinstance(value, int | float):
            yield "panfm_site_limit", {"limit": key}, value
    for content in limits.may_leave:
        yield "panfm_site_may_leave", {"content": content.value}, 1


def _messages(folder: Path, site: SiteConfig) -> Iterator[Sample]:
    lines = list(AuditLog(site_path(folder, site.state_dir)).lines())
    yield "panfm_site_messages_total", {}, len(lines)
    if lines and (newest := _time(lines[-1]["time"])) is not None:
        yield "panfm_site_last_contact_timestamp_seconds", {}, newest


def _approvals(folder: Path, site: SiteConfig) -> Iterator[Sample]:
    known = Experiments(folder, site)
    yield "panfm_site_experiments_approved", {}, sum(_may_ask(known, experiment) for experiment in known.decisions)
    yield "panfm_site_approvals_waiting", {}, len(known.requests.keys() - known.decisions.keys())


def _may_ask(known: Experiments, experiment: str) -> bool:
    """Whether a round that was not answered yet would find the experiment approved."""
    try:
        check_approved(
            experiment,
            known.decisions[experiment],
            asked=("", 0),
            answered=lambda: AuditLog(known.state_dir).rounds_of(experiment),
        )
    except PanfmError:
        return False
    return True


def _epsilon(folder: Path, site: SiteConfig) -> Iterator[Sample]:
    entries = PatientBudget(folder, site, site_path(folder, site.state_dir)).ledger.entries()
    last = entries[-1] if len(entries) > 1 else {}
    limit = site.limits.epsilon or last.get("limit")
    if limit is not None:
        yield "panfm_site_epsilon_spent", {}, last.get("epsilon", 0.0)
        yield "panfm_site_epsilon_limit", {}, limit


def _time(line: str) -> float | None:
    """The time that begins a line, in seconds since the epoch; None where there is none."""
    try:
        return datetime.fromisoformat(line.partition(" ")[0]).timestamp()
    except ValueError:
        return None
