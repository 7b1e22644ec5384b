"""`panfm site ...`: for the operator of one site, and the lines that these commands print."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from panfm.cli.common import NotedEnd, chain_end

if TYPE_CHECKING:
    from panfm.config import SiteConfig
    from panfm.hash_chain import Entry
    from panfm.site.dry_run import DryRun

app = typer.Typer(no_args_is_help=True, help="For the operator of one site.")


@app.command("init")
def site_init(
    folder: Annotated[Path, typer.Argument(help="New or existing folder of the site.")],
    name: Annotated[
        str, typer.Option(prompt="Stable name of the site", help="Known to the coordinator; asked for when left out.")
    ],
) -> None:
    """Write a commented site.toml and an empty manifest.csv."""
    from panfm.data.template import init_site

    init_site(folder, name)
    typer.echo(f"{folder}: fill in manifest.csv, then run: panfm site check {folder}")


@app.command("check")
def site_check(
    sites: Annotated[list[Path], typer.Argument(metavar="SITE...", help="Site folder; several are compared as well.")],
    run: Annotated[Path | None, typer.Option("--run", help="Description of the run (TOML).")] = None,
    holdout: Annotated[Path | None, typer.Option("--holdout", help="Folder of patients who are at no site.")] = None,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="List faulty rows and go on without them.")] = False,
) -> None:
    """Prepare every image as the run does, print who has what, then each fault on one line.

    Lines that begin with `note:` tell of images that are unusual, not faulty. With --quarantine the faulty rows are
    listed in quarantine.csv of their folder, and every run leaves them out until the list is written anew; exit status
    0.
    """
    from panfm.privacy.guarantees import load_checked_run

    description = load_checked_run(run) if run else None
    from panfm.cli.check_output import check_folders

    streams, organs = (description.streams, description.organs) if description else (None, None)
    if not check_folders(sites, holdout, streams, organs, quarantine=quarantine):
        raise typer.Exit(1)


@app.command("start")
def site_start(site: Annotated[Path, typer.Argument(help="Site folder.")]) -> None:
    """Run the site's worker until it is stopped: it answers handshakes and rounds at its socket, and nothing else."""
    import logging
    import os

    from panfm.config import load_site

    load_site(site)
    from panfm.site.handler import limit_memory
    from panfm.site.site import Site
    from panfm.site.worker import Worker, check_closed, listen

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    os.umask(0o077)
    opened = Site(site)
    check_closed(site, opened.config)
    limit_memory(opened.config.limits.memory_gib)
    with listen(site, opened.config) as listener:
        worker = Worker(opened, listener)
        typer.echo(f"{opened.config.name}: at work; its SuperNode, under Flower's account:")
        typer.echo(supernode_command(site, opened.config))
        if opened.config.limits.memory_gib is None:
            typer.echo("limits.memory-gib is not set: a run may fill all memory of this machine", err=True)
        worker.serve_forever()


@app.command("dry-run")
def site_dry_run(
    site: Annotated[Path, typer.Argument(help="Site folder.")],
    run: Annotated[Path, typer.Option("--run", help="Description of the run (TOML).")],
) -> None:
    """Try one local step of a run: its time and memory, and all that would leave the site. Nothing leaves."""
    from panfm.privacy.guarantees import load_checked_run

    description = load_checked_run(run)
    from panfm.site.dry_run import dry_run

    for line in dry_run_lines(dry_run(site, description)):
        typer.echo(line)


@app.command("status")
def site_status(site: Annotated[Path, typer.Argument(help="Site folder.")]) -> None:
    """Print whether the worker is at work, the rounds whose state is kept, and how much has left."""
    from panfm.config import load_site, site_path

    config = load_site(site)

    for line in status_lines(site, config, site_path(site, config.state_dir)):
        typer.echo(line)


@app.command("end")
def site_end(
    site: Annotated[Path, typer.Argument(help="Site folder.")],
    run: Annotated[str, typer.Argument(help="Id of the run, as `panfm site status` tells it.")],
) -> None:
    """End a run at this site for good: its questions are refused, and another run may begin."""
    from panfm.config import load_site, site_path

    state_dir = site_path(site, load_site(site).state_dir)
    from panfm.site.admission import end_run

    end_run(state_dir, run)
    typer.echo(f"run {run}: ended at this site")


@app.command("log")
def site_log(
    site: Annotated[Path, typer.Argument(help="Site folder.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the chain of hashes only, and print its end.")
    ] = False,
    noted: NotedEnd = None,
) -> None:
    """Print every message that left the site, oldest first. Ends with status 1 where the log was tampered with.

    Lines that were changed or taken out break the chain. Lines cut off at its end, or a record written anew from some
    line on, do not: they are found with --noted.
    """
    from panfm.config import load_site, site_path

    state_dir = site_path(site, load_site(site).state_dir)
    from panfm.site.audit_log import AuditLog

    audit_log, count, end = AuditLog(state_dir), 0, "nothing yet"
    for count, line in enumerate(audit_log.lines(), start=1):  # noqa: B007
        end = line["chain"]
        if not verify:
            typer.echo(message_line(line))
    if noted is not None:
        audit_log.check_noted(chain_end(noted))
    typer.echo(f"{count} messages, unbroken; the chain ends with: {end}")


def dry_run_lines(trial: "DryRun") -> Iterator[str]:
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
    yield f"every round leave {trial.bytes_up} bytes:"
    for name, array in reply.updates.items():
        yield f"  {name}: {array.dtype} {list(array.shape)}, {array.nbytes} bytes"
    for name, value in reply.to_records().metrics.items():
        yield f"  {name}: {'a number' if isinstance(value, int | float) else f'{len(value)} numbers'}"
    for name in reply.to_records().config:
        yield f"  {name}: the server's own words, or the round this site started from"


def status_lines(folder: Path, site: "SiteConfig", state_dir: Path) -> Iterator[str]:
    """Whether the worker is at work, the runs that it knows, and the messages that left."""
    from panfm.files import RoundFiles
    from panfm.site.admission import active_runs
    from panfm.site.audit_log import AuditLog
    from panfm.site.state import RUNS
    from panfm.site.worker import is_running

    yield f"{site.name}: the worker is {'at work' if is_running(folder, site) else 'not running'}"
    for run_folder in sorted(state_dir.glob(f"{RUNS}/*")):
        for number in RoundFiles(run_folder).rounds():
            yield f"run {run_folder.name}: private state after round {number}"
    for name, asked in active_runs(state_dir, site.limits).items():
        yield f"run {name}: not finished, asked for round {max(asked.digests)} of {asked.rounds}"
    lines = list(AuditLog(state_dir).lines())
    yield f"messages that left: {len(lines)}, {sum(line['bytes'] for line in lines)} bytes"
    if lines:
        yield f"last: {message_line(lines[-1])}"


def message_line(line: "Entry") -> str:
    """One message of the audit log."""
    groups = ", ".join(f"{name} {dtype}[{length}]" for name, dtype, length in line["arrays"]) or "no arrays"
    asked = "" if line["round"] is None else f" of round {line['round']} of {line['run']}"
    numbers = f"; numbers: {', '.join(line['numbers'])}" if line["numbers"] else ""
    privacy = "" if line.get("privacy", "none") == "none" else f"; privacy: {line['privacy']}"
    spent = "" if line.get("epsilon") is None else f"; epsilon {line['epsilon']:.3f} spent so far"
    message = f"{line['kind']}{asked}: {line['bytes']} bytes, sha256 {line['sha256'][:16]}"
    return f"{line['time']} {message}; {groups}{numbers}{privacy}{spent}"


def supernode_command(folder: Path, site: "SiteConfig") -> str:
    """The command that starts the site's SuperNode, ready for a shell."""
    from panfm.config import site_path

    coordinator = site.coordinator
    words = ["flower-supernode", "--superlink", coordinator.address]
    words += ["--root-certificates", str(site_path(folder, coordinator.root_certificates))]
    words += ["--auth-supernode-private-key", str(site_path(folder, coordinator.key))]
    return shlex.join(
        [*words, "--node-config", f"site-socket={json.dumps(str(site_path(folder, site.worker.socket)))}"]
    )
