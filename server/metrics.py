"""Metrics of a run in Prometheus' text format, read from the run folder."""

import shutil
from collections import Counter
from collections.abc import Iterator
from datetime import datetime

from panfm.report.prometheus import Sample, prometheus_text
from panfm.report.run_events import EventKind
from panfm.report.run_files import Run
from panfm.report.status import site_statuses

METRICS = {
    "panfm_run_rounds_done": ("gauge", "rounds done"),
    "panfm_run_rounds_planned": ("gauge", "rounds of the description"),
    "panfm_run_at_work": ("gauge", "1 while a server is at work in the run folder, else 0"),
    "panfm_run_finished": ("gauge", "1 once there is a model, else 0"),
    "panfm_run_round_seconds": ("gauge", "seconds of the last round"),
    "panfm_run_loss": ("gauge", "mean training loss of the last round, where sites tell it"),
    "panfm_run_last_event_timestamp_seconds": ("gauge", "time of the last event, in seconds since the epoch"),
    "panfm_run_events_total": ("counter", "events of the history, by kind"),
    "panfm_run_disk_free_bytes": ("gauge", "free bytes on the disk of the run folder"),
    "panfm_run_site_answered_rounds": ("gauge", "rounds in which a site's reply was taken"),
    "panfm_run_site_in_last_round": ("gauge", "1 if a site's reply was taken in the last round, else 0"),
    "panfm_run_site_epsilon": ("gauge", "planned epsilon of a site so far, in a private run"),
}
"""Name -> kind, and meaning with its unit."""


def metrics_text(run: Run) -> str:
    """All metrics of a run."""
    return prometheus_text(METRICS, _samples(run), {"run": run.config.name})


def _samples(run: Run) -> Iterator[Sample]:
    last = run.rounds[-1] if run.rounds else {}
    yield "panfm_run_rounds_done", {}, len(run.rounds)
    yield "panfm_run_rounds_planned", {}, run.config.train.rounds
    yield "panfm_run_at_work", {}, run.is_at_work
    yield "panfm_run_finished", {}, run.is_finished
    for name, key in (("panfm_run_round_seconds", "seconds"), ("panfm_run_loss", "loss")):
        if last.get(key) is not None:
            yield name, {}, last[key]
    if run.events:
        newest = datetime.fromisoformat(run.events[-1].time).timestamp()
        yield "panfm_run_last_event_timestamp_seconds", {}, newest
    counts = Counter(event.kind for event in run.events)
    for kind in EventKind:
        yield "panfm_run_events_total", {"kind": kind.value}, counts[kind]
    yield "panfm_run_disk_free_bytes", {}, shutil.disk_usage(run.folder).free
    for status in site_statuses(run):
        site = {"site": status.site}
        yield "panfm_run_site_answered_rounds", site, status.answered
        yield "panfm_run_site_in_last_round", site, status.site in last.get("sites", {})
        if status.epsilon is not None:
            yield "panfm_run_site_epsilon", site, status.epsilon
