"""`panfm site ...`: for the operator of one site."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from panfm.cli.common import NotedEnd, chain_end, progress_bar
from panfm.errors import DataError

if TYPE_CHECKING:
    from panfm.config import SiteConfig
    from panfm.data.check import SiteReport

app = typer.Typer(no_args_is_help=True, help="For the operator of one site.")
_SPLITS = ("train", "val", "test")


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
    site: Annotated[Path, typer.Argument(help="Site folder.")],
    run: Annotated[Path | None, typer.Option("--run", help="Description of the run (TOML).")] = None,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="List faulty rows and go on without them.")] = False,
) -> None:
    """Read every image, print who has what, then each fault on one line.

    With --quarantine the faulty rows are listed in SITE/quarantine.csv, and every run leaves them out until the list is
    written anew; exit status 0.
    """
    from panfm.privacy.guarantees import load_checked_run

    description = load_checked_run(run) if run else None
    from panfm.data.check import check_site
    from panfm.data.manifest import read_quarantine

    streams, organs = (description.streams, description.organs) if description else (None, None)
    with progress_bar("reading images") as progress:
        report = check_site(site, streams, organs=organs, progress=progress)
    _print_coverage(report)
    for fault in report.faults:
        typer.echo(str(fault))
    if quarantine:
        _quarantine(site, report)
        return
    if listed := read_quarantine(site):
        typer.echo(f"quarantine.csv: {len(listed)} rows are left out of every run; --quarantine writes the list anew")
    if report.faults:
        raise typer.Exit(1)


def _quarantine(site: Path, report: "SiteReport") -> None:
    from panfm.data.manifest import write_quarantine

    if not report.rows:
        raise DataError(f"{site}: found no sound row, expected at least one")
    path = write_quarantine(site, report.faults)
    typer.echo(f"{path}: {len(report.faults)} rows left out, {len(report.rows)} stay")


def _print_coverage(report: "SiteReport") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("stream", *_SPLITS, title=f"{report.site}: subjects")
    for column in table.columns[1:]:
        column.justify = "right"
    for stream in sorted({row.stream for row in report.rows}):
        note = " (not in this run)" if stream in report.unused else ""
        table.add_row(stream + note, *(str(report.coverage[stream, split]) for split in _SPLITS))
    table.add_section()
    subjects = {(row.subject, row.split) for row in report.rows}
    table.add_row("any", *(str(sum(split == own for _, own in subjects)) for split in _SPLITS))
    Console().print(table)


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
    from panfm.cli.site_lines import dry_run_lines
    from panfm.site.dry_run import dry_run

    for line in dry_run_lines(dry_run(site, description)):
        typer.echo(line)


@app.command("status")
def site_status(site: Annotated[Path, typer.Argument(help="Site folder.")]) -> None:
    """Print whether the worker is at work, the rounds whose state is kept, and how much has left."""
    from panfm.config import load_site, site_path

    config = load_site(site)
    from panfm.cli.site_lines import status_lines

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
    from panfm.cli.site_lines import message_line
    from panfm.site.audit_log import AuditLog

    audit_log, count, end = AuditLog(state_dir), 0, "nothing yet"
    for count, line in enumerate(audit_log.lines(), start=1):  # noqa: B007
        end = line["chain"]
        if not verify:
            typer.echo(message_line(line))
    if noted is not None:
        audit_log.check_noted(chain_end(noted))
    typer.echo(f"{count} messages, unbroken; the chain ends with: {end}")


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
