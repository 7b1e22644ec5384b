"""Lines on a dry run, for `panfm site dry-run` and `requests`: its cost, and everything that would leave."""

from collections.abc import Iterator

from panfm.site.dry_run import DryRun


def dry_run_lines(trial: DryRun) -> Iterator[str]:
    """The hash of a run and the decision on it, its cost, and everything that would leave."""
    yield f"experiment {trial.experiment}: {trial.decision or 'not approved yet'}"
    if trial.lacks_start:
        yield "its [start] lacks parameters, so that the run has another hash: ask the coordinator for the run.toml"
    yield from cost_lines(trial)


def cost_lines(trial: DryRun) -> Iterator[str]:
    """The cost of a run, and everything that would leave."""
    handshake, reply = trial.handshake, trial.reply
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
