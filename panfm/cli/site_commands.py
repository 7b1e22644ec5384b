"""`panfm site ...`: for the operator of one site, all but `start` (worker_command.py)."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from panfm.cli.command_parts import NotedEnd, chain_end

app = typer.Typer(no_args_is_help=True, help="For the operator of one site.")
_Site = Annotated[Path, typer.Argument(help="Site folder.")]
_Experiment = Annotated[
    str, typer.Argument(metavar="HASH", help="Hash of the experiment, or its first 8 or more characters.")
]
_Operator = Annotated[
    str | None, typer.Option("--name", help="Your name in the register; the name you logged in with when left out.")
]


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


@app.command("dry-run")
def site_dry_run(
    site: Annotated[Path, typer.Argument(help="Site folder.")],
    run: Annotated[Path, typer.Option("--run", help="Description of the run (TOML).")],
) -> None:
    """Try one local step of a run: its time and memory, and all that would leave the site. Nothing leaves."""
    from panfm.privacy.guarantees import load_checked_run

    description = load_checked_run(run)
    from panfm.cli.dry_run_lines import dry_run_lines
    from panfm.site.dry_run import dry_run

    for line in dry_run_lines(dry_run(site, description)):
        typer.echo(line)


@app.command("status")
def site_status(site: Annotated[Path, typer.Argument(help="Site folder.")]) -> None:
    """Print whether the worker is at work, limits and approvals in force, runs, what has left, and the last error.

    Ends with status 1 where site.toml does not hold: the worker then answers nothing until the file is mended.
    """
    from panfm.config import load_site
    from panfm.errors import ConfigError

    try:
        config = load_site(site)
    except ConfigError as error:
        raise ConfigError(f"{site / 'site.toml'}: the worker answers nothing until this is mended:\n{error}") from error
    from panfm.cli.site_lines import status_lines

    for line in status_lines(site, config):
        typer.echo(line)


@app.command("metrics")
def site_metrics(
    site: _Site,
    out: Annotated[
        Path | None, typer.Option(help="File to write whole, e.g. for node-exporter's textfile collector.")
    ] = None,
) -> None:
    """Print metrics of the site in Prometheus' text format, or write them into a file. Nothing leaves.

    Ends with status 1, and leaves the file as it was, where site.toml does not hold.
    """
    from panfm.config import load_site

    config = load_site(site)
    from panfm.cli.site_metrics import site_metrics_text
    from panfm.report.prometheus import write_metrics

    text = site_metrics_text(site, config)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_metrics(out, text)


@app.command("doctor")
def site_doctor(
    site: _Site,
    supernode_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port on which the SuperNode serves its ClientApps.")
    ] = 9094,
) -> None:
    """Check, as root, that other accounts of this machine are kept out and that the site can take part.

    One line per check: ok, FAULT with what to do, or unknown where this account cannot look. Status 0 only if all are
    ok. It connects to the coordinator's address, and sends nothing of the site.
    """
    from panfm.config import load_site

    config = load_site(site)
    from panfm.cli.machine_checks import tell
    from panfm.cli.site_doctor import site_findings

    tell(site_findings(site, config, supernode_port))


@app.command("watchdog")
def site_watchdog(
    site: _Site,
    unit: Annotated[str, typer.Option(help="The SuperNode's unit of systemd.")] = "panfm-supernode.service",
    patience: Annotated[
        float, typer.Option(min=1.0, metavar="MINUTES", help="Time without a question, beyond the run's own pace.")
    ] = 30.0,
) -> None:
    """Start the SuperNode anew, as root, if a reply of the worker may wait in it: a run that is not finished was
    answered, and nothing was asked for long. Once for each reply; panfm-watchdog.timer calls it every five minutes.
    """
    from panfm.config import load_site, site_path

    config = load_site(site)
    state_dir = site_path(site, config.state_dir)
    from panfm.cli.site_watchdog import watch_once
    from panfm.site.audit_log import AuditLog
    from panfm.site.state import active_runs

    lines = list(AuditLog(state_dir).lines())
    typer.echo(watch_once(lines, active_runs(state_dir, config.limits), unit, 60.0 * patience))


@app.command("requests")
def site_requests(
    site: _Site,
    experiment: Annotated[
        str | None, typer.Argument(metavar="[HASH]", help="Show one experiment, by 8 or more characters of its hash.")
    ] = None,
) -> None:
    """List the experiments that have asked this site, with your decision on each; with a hash, show one in full.

    That is its description, the difference from the last one you approved, what it would spend of your patients'
    privacy, and a dry run: the cost of one local step, and everything that would leave. Nothing leaves.
    """
    from panfm.config import load_site

    config = load_site(site)
    from panfm.cli.request_lines import Experiments

    known = Experiments(site, config)
    for line in known.details(known.find(experiment)) if experiment else known.lines():
        typer.echo(line)


@app.command("approve")
def site_approve(
    site: _Site,
    experiment: _Experiment,
    until: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], metavar="DATE", help="Last day, YYYY-MM-DD; else no end.")
    ] = None,
    max_rounds: Annotated[
        int | None, typer.Option(min=1, help="Most rounds, counted over all runs of the experiment; else no bound.")
    ] = None,
    name: _Operator = None,
) -> None:
    """Let an experiment run at this site, from the next question on. The newest decision on an experiment counts.

    Decisions are kept in a register whose lines are only added, each with your name (approvals.jsonl, in the ledger
    folder). An experiment that has not asked yet is named by its whole hash.
    """
    from panfm.config import load_site

    config = load_site(site)
    from panfm.cli.request_lines import Experiments, decided_lines, login_name

    known = Experiments(site, config)
    full, by, day = known.find(experiment), login_name() if name is None else name, until and until.date()
    decision = known.register.approve(full, by=by, until=day, max_rounds=max_rounds)
    for line in decided_lines(full, decision, known.requests.get(full)):
        typer.echo(line)


@app.command("reject")
def site_reject(site: _Site, experiment: _Experiment, name: _Operator = None) -> None:
    """Refuse an experiment from the next question on, also one that you approved before."""
    from panfm.config import load_site

    config = load_site(site)
    from panfm.cli.request_lines import Experiments, decided_lines, login_name

    known = Experiments(site, config)
    full = known.find(experiment)
    decision = known.register.reject(full, by=login_name() if name is None else name)
    for line in decided_lines(full, decision, known.requests.get(full)):
        typer.echo(line)


@app.command("clean")
def site_clean(site: _Site, yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False) -> None:
    """Remove the private state of runs that are over: finished and quiet for limits.idle-hours, or ended by you.

    Ledger, register of approvals, audit log, and the notes of what a run has asked stay.
    """
    from panfm.config import load_site, site_path

    config = load_site(site)
    from panfm.cli.removal import confirm_removal
    from panfm.site.past_runs import states_of_past_runs

    confirm_removal(states_of_past_runs(site_path(site, config.state_dir), config.limits), yes=yes)


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
    accept: Annotated[
        bool, typer.Option("--accept", help="Go on with the log as it is, after lines of it were lost for good.")
    ] = False,
) -> None:
    """Print every message that left the site, oldest first. Ends with status 1 where the log was tampered with.

    Lines that were changed or taken out break the chain, and the anchor remembers its end. A record written anew
    together with its anchor is found with --noted.
    """
    from panfm.config import load_site, site_path

    state_dir = site_path(site, load_site(site).state_dir)
    from panfm.cli.site_lines import message_line
    from panfm.site.audit_log import AuditLog

    audit_log, count, end = AuditLog(state_dir), 0, "nothing yet"
    if accept:
        from panfm.cli.site_lines import accept_audit_log

        typer.echo(f"accepted as it is; the chain ends with: {accept_audit_log(state_dir)}")
        return
    for count, line in enumerate(audit_log.lines(), start=1):  # noqa: B007
        end = line["chain"]
        if not verify:
            typer.echo(message_line(line))
    if noted is not None:
        audit_log.chain.check_noted(audit_log.lines(), chain_end(noted))
    typer.echo(f"{count} messages, unbroken; the chain ends with: {end}")
