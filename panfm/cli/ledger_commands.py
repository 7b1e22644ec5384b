"""`panfm ledger ...`: the privacy that a site has spent, and what a private run would spend."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from panfm.cli.command_parts import chain_end
from panfm.cli.common import Overrides
from panfm.errors import LedgerError

if TYPE_CHECKING:
    from panfm.privacy.ledger import Ledger

app = typer.Typer(no_args_is_help=True, help="What a site has spent of its patients' privacy.")
_FOLDER_HELP = "Site folder, or run folder with site-level privacy."


@app.command("show")
def ledger_show(folder: Annotated[Path, typer.Argument(help=_FOLDER_HELP)]) -> None:
    """Print what was promised, what is spent, on what, and what is not covered.

    Written for a data-protection officer. A site's ledger is shared by all runs on its patients, and is written before
    anything is sent. A run folder has one where the server added noise for its sites (table `site-dp`). Note the
    end of the chain elsewhere: `panfm ledger verify --noted` finds with it whether entries were cut off.
    """
    from panfm.privacy.statement import statement

    entries = _ledger(folder).entries()
    for line in statement(entries):
        typer.echo(line)
    if entries:
        typer.echo(f"The chain ends with: {entries[-1]['hash']}")


@app.command("verify")
def ledger_verify(
    folder: Annotated[Path, typer.Argument(help=_FOLDER_HELP)],
    noted: Annotated[
        str | None,
        typer.Option(help="An end of the chain that you wrote down earlier: it must still be in the ledger."),
    ] = None,
) -> None:
    """Check that no entry was changed, moved or removed: every line holds the hash of the one before.

    The anchor in the site's state folder tells whether entries were cut off; whoever cuts ledger and anchor alike is
    found with --noted. Where the anchor is lost, rounds are refused until --noted names an end that the ledger still
    holds: the anchor is then written anew.
    """
    ledger = _ledger(folder)
    if noted is not None and ledger.check_noted(chain_end(noted)):
        typer.echo(f"{ledger.path}: its anchor was missing and is written anew, as the end noted is in the ledger")
    entries = ledger.entries()
    typer.echo(f"{ledger.path}: {len(entries)} entries, each follows from the one before")
    typer.echo(f"The chain ends with: {entries[-1]['hash'] if entries else 'nothing yet'}")


@app.command("plan")
def ledger_plan(
    run: Annotated[Path, typer.Argument(help="Description of a private run (TOML).")],
    overrides: Overrides = None,
    site: Annotated[Path | None, typer.Option(help="Site or run folder: on top of what its ledger holds.")] = None,
) -> None:
    """Epsilon of a run with its noise, and the noise with which it would spend its epsilon.

    Try other numbers with --set: patient-dp.epsilon=2, train.rounds=5, patient-dp.sample-rate=0.1. With --site, on top
    of what is spent there already.
    """
    from panfm.privacy.guarantees import load_checked_run

    description = load_checked_run(run, overrides or ())
    from panfm.privacy.statement import plan

    for line in plan(description, _ledger(site).entries() if site else ()):
        typer.echo(line)


def _ledger(folder: Path) -> "Ledger":
    from panfm.config import load_run, load_site, site_path

    if (folder / "run.toml").is_file() and not (folder / "site.toml").is_file():
        if load_run(folder / "run.toml").site_dp is None:
            raise LedgerError(f"{folder}: a run without site-dp has no ledger, its sites do; name a site folder")
        from panfm.privacy.ledger import run_ledger

        return run_ledger(folder)
    site = load_site(folder)
    from panfm.site.patient_budget import PatientBudget

    return PatientBudget(folder, site, site_path(folder, site.state_dir)).ledger
