"""Lines that `panfm site status` and `log` print; the worker does without them."""

import textwrap
from collections.abc import Iterator
from pathlib import Path

from panfm.cli.request_lines import Experiments
from panfm.cli.site_health import certificate_end, free_space, last_error, next_round
from panfm.config import SiteConfig, site_path
from panfm.config.site_description import LimitsConfig
from panfm.errors import DataError
from panfm.files import RoundFiles
from panfm.hash_chain import Entry
from panfm.site.audit_log import AuditLog
from panfm.site.state import RUNS, active_runs
from panfm.site.worker import is_running


def status_lines(folder: Path, site: SiteConfig) -> Iterator[str]:
    """Whether the worker is at work, limits and approvals in force, runs, messages, the last error, and the disk."""
    state_dir = site_path(folder, site.state_dir)
    yield f"{site.name}: the worker is {'at work' if is_running(folder, site) else 'not running'}"
    yield from _limit_lines(site.limits)
    yield from _approval_lines(folder, site)
    for run_folder in sorted(state_dir.glob(f"{RUNS}/*")):
        for number in RoundFiles(run_folder).rounds():
            yield f"run {run_folder.name}: private state after round {number}"
    lines: list[Entry] = []
    try:
        lines.extend(AuditLog(state_dir).lines())
    except DataError as error:
        yield f"nothing is answered, the audit log does not hold: {error}"
    for name, asked in active_runs(state_dir, site.limits).items():
        yield f"run {name}: not finished, asked for round {max(asked.digests, default=0)} of {asked.rounds}"
        if due := next_round(lines, name):
            yield f"run {name}: next round expected about {due}, by the pace of its last ones"
    yield f"messages that left: {len(lines)}, {sum(line['bytes'] for line in lines)} bytes"
    if lines:
        yield f"last contact: {message_line(lines[-1])}"
    yield f"last error: {last_error(state_dir) or 'none'}"
    yield f"free disk: {free_space(state_dir)}"
    yield f"the coordinator's certificate authority: {certificate_end(folder, site)}"


def _approval_lines(folder: Path, site: SiteConfig) -> Iterator[str]:
    """Decisions on experiments, and how many wait for one."""
    try:
        known = Experiments(folder, site)
    except DataError as error:
        yield f"nothing is answered, the register of approvals does not hold: {error}"
        return
    for experiment in known.decisions:
        yield f"experiment {experiment}: {known.state(experiment)}"
    if pending := known.requests.keys() - known.decisions.keys():
        yield f"experiments that wait for your decision: {len(pending)}, see: panfm site requests {folder}"


def _limit_lines(limits: LimitsConfig) -> Iterator[str]:
    """All limits, as they are in force from the next question on."""
    table = limits.model_dump(mode="json", by_alias=True, exclude_none=True)
    words = [
        f"{key} {', '.join(value) or 'none' if isinstance(value, list) else value}" for key, value in table.items()
    ]
    yield from textwrap.wrap(f"limits in force: {'; '.join(words)}", 116, subsequent_indent="  ")


def message_line(line: Entry) -> str:
    """One message of the audit log."""
    groups = ", ".join(f"{name} {dtype}[{length}]" for name, dtype, length in line["arrays"]) or "no arrays"
    asked = "" if line["round"] is None else f" of round {line['round']} of {line['run']}"
    experiment = f"; experiment {line['experiment'][:12]}" if line.get("experiment") else ""
    numbers = f"; numbers: {', '.join(line['numbers'])}" if line["numbers"] else ""
    privacy = "" if line.get("privacy", "none") == "none" else f"; privacy: {line['privacy']}"
    spent = "" if line.get("epsilon") is None else f"; epsilon {line['epsilon']:.3f} spent so far"
    summed = "".join(
        f"; {task}: {', '.join(labels)}" for task, labels in line.get("summed", {}).get("labels", {}).items()
    )
    summed += "".join(f"; {stream}" for stream in line.get("summed", {}).get("streams", ()))
    if "summed" in line:
        kind = "sums for " * (line["summed"]["purpose"] != "evaluation")
        asked += f", {kind}{line['summed']['purpose']}{summed}"
    asked += ", repeated" if "repeat" in line else ""
    message = f"{line['kind']}{asked}: {line['bytes']} bytes, sha256 {line['sha256'][:16]}"
    return f"{line['time']} {message}; {groups}{numbers}{experiment}{privacy}{spent}"


def accept_audit_log(state_dir: Path) -> str:
    """Write the anchor of the audit log anew for the log as it is; returns the hash of its end."""
    chain = AuditLog(state_dir).chain
    with chain.writing() as file:
        _, position = chain.snapshot(file)
        chain.write_anchor(position.end)
    return position.end
