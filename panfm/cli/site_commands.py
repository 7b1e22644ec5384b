"""`panfm site ...`: for the operator of one site."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from panfm.cli.common import NotedEnd, chain_end

if TYPE_CHECKING:
    from panfm.config import SiteConfig

app = typer.Typer(no_args_is_help=True, help="For the operator of one site.")


@app.command("init")
def site_init(
    folder: Annotated[Path, typer.Argument(help="New or existing folder of the site.")],
    name: Annotated[str | None, typer.Option(help="Stable name, known to the coordinator; asked for.")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="Folder of images (BIDS or any), or table (.csv, .tsv) of them.")
    ] = None,
    stream: Annotated[list[str] | None, typer.Option(help="With --from: STREAM='PATTERN', once per pattern.")] = None,
    subject: Annotated[str | None, typer.Option(help="With --from: expression that finds the patient.")] = None,
    split: Annotated[str | None, typer.Option(help="With --from: of all new patients; test for a hold-out.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --from: write without asking.")] = False,
) -> None:
    """Write a commented site.toml and manifest.csv: an empty one, or with --from the images that are there.

    With --from, subjects, streams and splits are read from file names or a table and shown, and nothing is written
    before you agree. A site that exists is completed: its rows stay as they are. Images stay where they are.
    """
    from panfm.cli.data_commands import init_empty, init_from

    if source is None:
        init_empty(folder, name)
    else:
        init_from(folder, name, source, streams=stream or (), subject=subject, split=split or "", yes=yes)


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
    from panfm.site.state import end_run

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
