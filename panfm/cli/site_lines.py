"""Lines that `panfm site dry-run`, `status` and `log` print; the worker does without them."""

from collections.abc import Iterator
from pathlib import Path

from panfm.config import SiteConfig
from panfm.files import RoundFiles
from panfm.hash_chain import Entry
from panfm.site.audit_log import AuditLog
from panfm.site.dry_run import DryRun
from panfm.site.state import RUNS, active_runs
from panfm.site.worker import is_running


def dry_run_lines(trial: DryRun) -> Iterator[str]:
    """The cost of a run, and everything that would leave."""
    handshake, reply = trial.handshake, trial.reply
    yield f"experiment {trial.experiment} (for limits.experiments in site.toml)"
    if not trial.is_named:
        yield "limits.experiments does not name it: the worker would refuse this run"
    if trial.start:
        yield f"starts from the model {trial.start} (for limits.starts in site.toml)"
    gpu = "" if trial.gpu_gib is None else f", {trial.gpu_gib:.2f} GiB of the GPU"
    yield f"one local step: {trial.seconds:.3f} s; at most {trial.memory_gib:.2f} GiB of memory{gpu}"
    yield "before round 1 leave:"
    streams = ", ".join(f"{stream} {count}" for stream, count in handshake.streams.items())
    yield f"  name {handshake.site}; subjects {handshake.subjects}; with {streams}"
    yield f"  versions {', '.join(f'{name} {version}' for name, version in handshake.versions.items())}"
    if trial.input_sums:
        yield f"  {trial.input_sums}"
    yield f"every round leave {trial.bytes_up} bytes:"
    for name, array in reply.updates.items():
        yield f"  {name}: {array.dtype} {list(array.shape)}, {array.nbytes} bytes"
    for name, value in reply.to_records().metrics.items():
        yield f"  {name}: {'a number' if isinstance(value, int | float) else f'{len(value)} numbers'}"
    for name in reply.to_records().config:
        yield f"  {name}: the server's own words, or the round this site started from"
    if trial.trains_on:
        yield f"trains on a column of your label table: {trial.trains_on}; updates tell of these labels"
    if trial.sums:
        yield trial.sums


def status_lines(folder: Path, site: SiteConfig, state_dir: Path) -> Iterator[str]:
    """Whether the worker is at work, the runs that it knows, and the messages that left."""
    yield f"{site.name}: the worker is {'at work' if is_running(folder, site) else 'not running'}"
    for run_folder in sorted(state_dir.glob(f"{RUNS}/*")):
        for number in RoundFiles(run_folder).rounds():
            yield f"run {run_folder.name}: private state after round {number}"
    for name, asked in active_runs(state_dir, site.limits).items():
        yield f"run {name}: not finished, asked for round {max(asked.digests, default=0)} of {asked.rounds}"
    lines = list(AuditLog(state_dir).lines())
    yield f"messages that left: {len(lines)}, {sum(line['bytes'] for line in lines)} bytes"
    if lines:
        yield f"last: {message_line(lines[-1])}"


def message_line(line: Entry) -> str:
    """One message of the audit log."""
    groups = ", ".join(f"{name} {dtype}[{length}]" for name, dtype, length in line["arrays"]) or "no arrays"
    asked = "" if line["round"] is None else f" of round {line['round']} of {line['run']}"
    numbers = f"; numbers: {', '.join(line['numbers'])}" if line["numbers"] else ""
    privacy = "" if line.get("privacy", "none") == "none" else f"; privacy: {line['privacy']}"
    spent = "" if line.get("epsilon") is None else f"; epsilon {line['epsilon']:.3f} spent so far"
    summed = "".join(
        f"; {task}: {', '.join(labels)}" for task, labels in line.get("summed", {}).get("labels", {}).items()
    )
    summed += "".join(f"; {stream}" for stream in line.get("summed", {}).get("streams", ()))
    asked += f", sums for {line['summed']['purpose']}{summed}" if "summed" in line else ""
    message = f"{line['kind']}{asked}: {line['bytes']} bytes, sha256 {line['sha256'][:16]}"
    return f"{line['time']} {message}; {groups}{numbers}{privacy}{spent}"
