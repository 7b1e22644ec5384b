"""The coordinator's commands. A run is named by its run folder, whose flower.json says where Flower runs it.

Every command ends with status 0 only if it has reached its aim: `start`, `resume`, `watch` and `keep` if the run
finished, `status` if it runs or has finished, `stop` if it has stopped. Run them under the ServerApp's account, on its
machine.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from panfm.cli.common import Overrides, Version
from panfm.cli.model_commands import export
from panfm.errors import ConfigError, DataError, RunError, reason
from panfm.files import make_files_private, write_atomic
from panfm.outputs import write_json
from server.flower_cli import FlowerRun, as_one_word, flower_environment, submit
from server.hospital_commands import app as hospital_commands

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]
_Detach = Annotated[bool, typer.Option("--detach", help="Do not watch it; status 0 once Flower has taken it.")]
_RosterFile = Annotated[
    Path | None, typer.Option("--roster", help="Table of expected sites; others, and larger ones, take no part.")
]
_AlertsFile = Annotated[
    Path | None, typer.Option("--alerts", help="TOML: webhook and mail that are told of the run's events.")
]
_STOP_S = 120.0
"""Flower ends the ServerApp of a stopped run within about a minute."""
_POLL_S = 1.0
_GAVE_UP = 3
"""Status of `keep`, after which its unit does not start it again."""


@app.callback()
def main(_version: Version = False) -> None:
    """For the coordinator: start a run over real sites, watch it, go on with it after a failure, export its model."""
    make_files_private()


app.command("export")(export)
app.add_typer(hospital_commands)
roster = typer.Typer(no_args_is_help=True, help="The table of expected sites and their subjects, kept by you alone.")
app.add_typer(roster, name="roster")


@app.command()
def start(
    experiment: Annotated[Path, typer.Argument(help="Run description (TOML).")],
    connection: Annotated[str, typer.Option(help="SuperLink connection in $FLWR_HOME/config.toml.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<name>-<time>.")] = None,
    roster_file: _RosterFile = None,
    alerts_file: _AlertsFile = None,
    detach: _Detach = False,
) -> None:
    """Start a run, and watch it to its end."""
    from panfm.privacy.guarantees import load_checked_run

    run = load_checked_run(experiment, overrides or ())
    from panfm.config import experiment_hash
    from server.expected_sites import ExpectedSites
    from server.run_folder import RunFolder, default_path

    expected, alerts = ExpectedSites.read(roster_file) if roster_file else None, _alerts(alerts_file)
    folder = out or default_path(run.name)
    is_new = not folder.exists()
    created = RunFolder.create(folder, run)
    if expected:
        created.expect(expected)
    if alerts is not None:
        created.keep_alerts(alerts)
    try:
        _submit(folder, connection)
    except RunError:
        if is_new:
            shutil.rmtree(folder)
        raise
    typer.echo(f"experiment {experiment_hash(created.run)}")
    _watch_unless(detach, folder)


@app.command()
def resume(
    run_dir: _RunDir,
    connection: Annotated[str | None, typer.Option(help="Another connection than it was started on.")] = None,
    roster_file: _RosterFile = None,
    alerts_file: _AlertsFile = None,
    detach: _Detach = False,
) -> None:
    """Go on with a run from its last checkpoint, as it was described, and watch it to its end. A table or alerts
    given here take the place of those that it was started with."""
    from panfm.report.run_files import read_run

    run = read_run(run_dir)
    from server.expected_sites import ExpectedSites
    from server.run_folder import RunFolder

    expected, alerts = ExpectedSites.read(roster_file) if roster_file else None, _alerts(alerts_file)
    if run.is_at_work:
        raise RunError(f"{run_dir}: is running, expected a run that has ended; stop it first")
    if run.is_finished:
        raise RunError(f"{run_dir}: has finished, expected a run that has not")
    from server.keeper import in_turn

    with in_turn(run_dir):
        known = _flower_run(run_dir)
        if connection is None and known is None:
            raise RunError(f"{run_dir}: was not started with `python -m server start`; name a --connection")
        if known and connection in (None, known.connection):
            status, _ = known.entry(flower_environment())
            if not status.startswith("finished"):
                raise RunError(f"{run_dir}: Flower's run {known.run_id} is {status}; stop it first")
        if expected:
            RunFolder(run_dir, run.config).expect(expected)
        if alerts is not None:
            RunFolder(run_dir, run.config).keep_alerts(alerts)
        _submit(run_dir, connection or (known.connection if known else ""))
    _watch_unless(detach, run_dir)


@app.command("hash")
def show_hash(
    experiment: Annotated[Path, typer.Argument(help="Run description (TOML).")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the description as sites are sent it: what the hash is of.")
    ] = None,
) -> None:
    """Print the hash of an experiment, by which sites approve it. It is the same in all that a run writes and shows."""
    from panfm.privacy.guarantees import load_checked_run

    run = load_checked_run(experiment, overrides or ())
    from panfm.config import as_told, dump_toml, experiment_hash
    from server.run_folder import with_start

    described, _ = with_start(run)
    if out:
        if out.exists():
            raise RunError(f"{out}: exists, expected a new file")
        write_atomic(out, dump_toml(as_told(described)).encode())
    typer.echo(experiment_hash(described))


@app.command()
def clean(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
) -> None:
    """Remove the checkpoints of finished runs, which then cannot be given more rounds. Models, histories, ledgers, and
    runs that may still go on stay."""
    from panfm.cli.removal import confirm_removal
    from panfm.report.run_files import read_run

    runs = {run_dir: read_run(run_dir) for run_dir in run_dirs}
    for run_dir, run in runs.items():
        if run.state != "finished":
            typer.echo(f"{run_dir}: {run.state}, stays")
    kept = [path for path, run in runs.items() if run.state == "finished"]
    patterns = ("round-*.state", "label-sums-*.safetensors")
    confirm_removal(
        [path for run in kept for name in patterns for path in sorted(run.glob(f"checkpoint/{name}"))], yes=yes
    )


@app.command()
def status(run_dir: _RunDir) -> None:
    """Print one screen of a run: rounds done, sites, streams, and who was left out."""
    from rich.console import Console

    from panfm.report.run_files import read_run

    run, flower = read_run(run_dir), _flower_run(run_dir)
    from server.console import screen, why_not_finished

    Console().print(screen(run))
    if run.state in ("running", "finished"):
        return
    status, details = flower.entry(flower_environment()) if flower else ("", "")
    if flower and status and not status.startswith("finished"):
        typer.echo(f"Flower: run {flower.run_id} is {status}")
        return
    raise RunError(f"{run_dir}: {why_not_finished(run, status, details)}")


@app.command()
def evaluate(
    run_dir: _RunDir,
    columns: Annotated[
        list[str], typer.Option("--task", metavar="COLUMN", help="Column of the sites' label tables; may be repeated.")
    ],
    connection: Annotated[str | None, typer.Option(help="Another connection than it was started on.")] = None,
) -> None:
    """Let each site score the model of a finished run on its own labels, and print AUC or R2 with 95 % intervals. A
    site answers for the columns that its operator has named, see limits.evaluation-labels of site.toml."""
    from panfm.report.run_files import read_run

    run, known = read_run(run_dir), _flower_run(run_dir)
    from server.evaluation import check_can_be_evaluated

    check_can_be_evaluated(run.config, columns)
    if not run.is_finished or run.is_at_work:
        raise RunError(f"{run_dir}: {run.state}, expected a run that has finished")
    if connection is None and known is None:
        raise RunError(f"{run_dir}: was not started with `python -m server start`; name a --connection")
    where, environment = connection or (known.connection if known else ""), flower_environment()
    words = {"run-dir": str(run_dir.resolve()), "evaluate": as_one_word(columns)}
    flower = FlowerRun(submit(where, words, environment), where)
    while not (entry := flower.entry(environment))[0].startswith("finished"):
        time.sleep(_POLL_S)
    from rich.console import Console

    from panfm.report.site_evaluation import read_evaluation
    from server.console import evaluation_table

    evaluation = read_evaluation(run_dir)
    if entry[0] != "finished:completed":
        raise RunError(f"{run_dir}: {evaluation.failure or ': '.join(entry)}")
    asked = evaluation.only(columns)
    Console(soft_wrap=True).print(evaluation_table(asked))
    for line in asked.left_out():
        typer.echo(f"left out: {line}")


@app.command()
def metrics(
    run_dir: _RunDir,
    out: Annotated[
        Path | None, typer.Option(help="File to write whole, e.g. for node-exporter's textfile collector.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Serve them at http://HOST:PORT/metrics until stopped.")
    ] = None,
) -> None:
    """Print metrics of a run in Prometheus' text format, write them into a file, or serve them over HTTP."""
    if out is not None and listen is not None:
        raise ConfigError("--out and --listen: expected one of them")
    from panfm.report.prometheus import write_metrics
    from panfm.report.run_files import read_run

    run = read_run(run_dir)
    from server.metrics import metrics_text

    if listen is not None:
        from server.metrics_page import MetricsServer

        with MetricsServer(run_dir, listen) as server:
            typer.echo(f"{run_dir}: metrics at http://{listen}/metrics")
            server.serve_forever()
    elif out is None:
        typer.echo(metrics_text(run), nl=False)
    else:
        write_metrics(out, metrics_text(run))


@app.command()
def doctor(
    config: Annotated[Path, typer.Option(help="Folder of keys, certificates and secret.")] = Path("/etc/panfm"),
    state: Annotated[Path, typer.Option(help="The SuperLink's own folder.")] = Path("/var/lib/panfm-coordinator"),
    runs: Annotated[Path, typer.Option(help="Folder of run folders.")] = Path("/srv/panfm/runs"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the SuperLink.")] = 8000,
    door: Annotated[int, typer.Option(min=1, max=65535, help="Port of nginx.")] = 443,
    account: Annotated[
        list[str] | None,
        typer.Option(help="The SuperLink's account, then nginx's; panfm-coordinator and www-data when left out."),
    ] = None,
) -> None:
    """Check, as root, that other accounts of this machine are kept out and that the deployment is healthy.

    One line per check: ok, FAULT with what to do, or unknown where this account cannot look. Status 0 only if all are
    ok.
    """
    from panfm.cli.machine_checks import tell
    from server.doctor import Places, coordinator_findings

    accounts = tuple(account or Places.accounts)
    tell(coordinator_findings(Places(config, state, runs, port, door, accounts)))


@app.command()
def watch(run_dir: _RunDir) -> None:
    """Show rounds as they end, until the run ends; also of a run that `python -m simulations` has started."""
    from rich.console import Console

    from panfm.report.run_files import read_run
    from server.console import follow, view

    console = Console(soft_wrap=True, highlight=False)
    flower = None if read_run(run_dir).is_finished else _flower_run(run_dir)
    with view(console) as show:
        follow(run_dir, show, flower, flower_environment())
    console.print(f"{run_dir}: finished; model: {run_dir / 'model'}", markup=False)


@app.command()
def stop(run_dir: _RunDir) -> None:
    """End a run; it can be resumed from the last round that it finished."""
    from panfm.report.run_files import read_run

    read_run(run_dir)
    from server.keeper import in_turn

    with in_turn(run_dir):
        _end(run_dir)
    run = read_run(run_dir)
    typer.echo(f"{run_dir}: stopped after {len(run.rounds)} of {run.config.train.rounds} rounds")


def _end(run_dir: Path) -> None:
    """Have Flower end a run, wait for its ServerApp, and write down that it was stopped."""
    from panfm.report.run_files import read_run
    from server.alerts import alerted
    from server.events import EventLog
    from server.keeper import can_heal
    from server.run_folder import RunFolder
    from server.tracking import refresh_page

    run, flower = read_run(run_dir), _flower_run(run_dir)
    if flower is None:
        raise RunError(f"{run_dir}: was not started with `python -m server start`; end the process that runs it")
    if run.is_finished and not run.is_at_work:
        raise RunError(f"{run_dir}: has finished, there is nothing to stop")
    environment = flower_environment()
    status, details = flower.entry(environment)
    is_over = status.startswith("finished")
    if is_over and (run.ending == "stopped" or not can_heal(run_dir)):
        raise RunError(f"{run_dir}: is not running; Flower: {status}: {details}")
    if not is_over:  # else a keeper may be about to submit it again
        flower.stop(environment)
    deadline = time.monotonic() + _STOP_S
    while read_run(run_dir).is_at_work:
        if time.monotonic() > deadline:
            raise RunError(f"{run_dir}: Flower has stopped the run, but its ServerApp is still at work")
        time.sleep(_POLL_S)
    RunFolder(run_dir, run.config).note_end("by the coordinator", state="stopped")
    with alerted(run_dir, run.config.name, EventLog(run_dir)):
        refresh_page(run_dir)


@app.command()
def keep(
    run_dir: _RunDir,
    connection: Annotated[str | None, typer.Option(help="Another connection than it was started on.")] = None,
) -> None:
    """Go on with a run from its last checkpoint whenever it has ended by something that heals, until it has finished.
    Then wait until alerts that its server could not send are out. Status 3: it was stopped, or goes on only if somebody
    does something."""
    from server.alerts import delivered
    from server.keeper import GaveUpError, Keeper

    known = _flower_run(run_dir)
    if connection is None and known is None:
        raise RunError(f"{run_dir}: was not started with `python -m server start`; name a --connection")
    where = connection or (known.connection if known else "")
    keeper = Keeper(run_dir, lambda: _flower_run(run_dir), lambda: _submit(run_dir, where), flower_environment())
    try:
        with delivered(run_dir):
            keeper.keep()
            typer.echo(f"{run_dir}: finished; model: {run_dir / 'model'}")
    except (GaveUpError, ConfigError, DataError) as error:  # a damaged folder does not heal by itself
        typer.echo(str(error), err=True)
        raise typer.Exit(_GAVE_UP) from error


@roster.command("make")
def make_roster(
    run_dir: _RunDir, out: Annotated[Path, typer.Option(help="File to write; CSV, one line per site.")]
) -> None:
    """Write a table of the subjects that the sites of a run stated, to be read and corrected by you."""
    from server.expected_sites import ExpectedSites

    if out.exists():
        raise RunError(f"{out}: exists, expected a new file")
    sites = ExpectedSites.of_run(run_dir)
    write_atomic(out, sites.to_csv().encode())
    typer.echo(f"{out}: {len(sites.sites)} sites; correct what you know better")


@roster.command("show")
def show_roster(file: Annotated[Path, typer.Argument(metavar="FILE", help="Table of expected sites.")]) -> None:
    """Check a table and print it."""
    from server.expected_sites import ExpectedSites

    typer.echo(ExpectedSites.read(file).to_csv(), nl=False)


@roster.command("check")
def check_roster(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Table of expected sites.")], run_dir: _RunDir
) -> None:
    """Compare the subjects that the sites of a run stated with a table; status 0 only if all of them fit."""
    from server.expected_sites import ExpectedSites

    expected, actual = ExpectedSites.read(file), ExpectedSites.of_run(run_dir)
    if faults := expected.faults(actual):
        raise RunError("; ".join(faults))
    typer.echo(f"{run_dir}: all {len(actual.sites)} sites are as expected")


def _submit(run_dir: Path, connection: str) -> None:
    """Hand a run folder to Flower, and write down where."""
    from server.events import EventLog
    from server.keeper import SUBMITTING
    from server.run_folder import ENDED

    path = str(run_dir.resolve())
    EventLog(run_dir).note_told_end(run_dir / ENDED)
    (run_dir / SUBMITTING).touch()
    run_id = submit(connection, {"run-dir": path, "resume": path}, flower_environment())
    (run_dir / ENDED).unlink(missing_ok=True)
    write_json(run_dir / "flower.json", {"run-id": run_id, "connection": connection})
    (run_dir / SUBMITTING).unlink()
    typer.echo(f"{run_dir}: Flower's run {run_id} on connection {connection}")


def _alerts(path: Path | None) -> str | None:
    """Text of a description of alerts. Raises ConfigError if it does not hold."""
    if path is None:
        return None
    from server.alerts_config import read_alerts

    read_alerts(path)
    return path.read_text(encoding="utf-8")


def _flower_run(run_dir: Path) -> FlowerRun | None:
    """Where Flower runs it; None if it was started otherwise. Raises RunError if the file is damaged."""
    path = run_dir / "flower.json"
    if not path.exists():
        return None
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
        return FlowerRun(str(int(words["run-id"])), str(words["connection"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{path}: expected the run-id and the connection of a run ({reason(error)})") from error


def _watch_unless(detach: bool, run_dir: Path) -> None:
    if not detach:
        watch(run_dir)
