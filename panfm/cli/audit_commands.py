"""`panfm audit ...`: attacks on a run's own privacy."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from panfm.cli.common import Overrides
from panfm.cli.model_arguments import Model, check_model, open_stores
from panfm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from panfm.config import RunConfig
    from panfm.privacy.audit_inversion import Scenario

app = typer.Typer(no_args_is_help=True, help="Attacks that test what privacy promises. Nothing leaves.")
_Json = Annotated[Path | None, typer.Option("--json", help="Write the findings here.")]
_Sites = Annotated[list[Path], typer.Argument(help="Site folders.")]


@app.command("step")
def audit_step(
    run: Annotated[Path, typer.Argument(help="Description of a private run (TOML).")],
    overrides: Overrides = None,
    canaries: Annotated[int, typer.Option(min=8, help="Made-up patients.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Private steps.")] = 40,
    json: _Json = None,
) -> None:
    """Run the real private step on canaries and bound its epsilon from below, at 95 % confidence.

    Canaries are made-up patients, each with a gradient along an axis of its own; a coin decides who is there. Who reads
    the noised sums guesses, and too many right guesses refute the claim. A correct step gives a bound of about a fifth
    of the claim or less; one above the claim is a bug, and the exit status is 1. Without noise or clipping a thousand
    canaries prove an epsilon of 5, so the audit tells most at a claim of 1 or 2: choose noise and steps accordingly. A
    step that is wrong by a factor of two can pass.
    """
    from panfm.privacy.guarantees import load_checked_run

    description = load_checked_run(run, overrides or ())
    from panfm.privacy.audit_step import DELTA, audit_step

    audit = audit_step(description, canaries=canaries, steps=steps)
    _write_json(json, asdict(audit))
    typer.echo(f"{audit.steps} steps, each canary in one with chance 0.25")
    typer.echo(f"claimed: epsilon {audit.claim:.3f} at delta {DELTA:g}")
    typer.echo(f"guesses: {audit.correct} of {audit.guesses} right, about {audit.canaries} canaries")
    typer.echo(f"proved: epsilon is at least {audit.lower_bound:.3f} (95 % confidence)")
    if audit.lower_bound > audit.claim:
        typer.echo("the step does NOT do what it claims", err=True)
        raise typer.Exit(1)


@app.command("membership")
def audit_membership(
    model: Model,
    sites: _Sites,
    before: Annotated[
        Path | None, typer.Option("--before", help="Model folder that the run started from; the seed's when left out.")
    ] = None,
    masks: Annotated[int, typer.Option(min=1, help="Masks over which a loss is averaged.")] = 8,
    json: _Json = None,
) -> None:
    """Try to tell from a finished model who was trained on: an AUC with its 95 % interval; 0.5 is chance.

    A site's train split stands against its other splits. The attack looks at how far training lowered each patient's
    loss. An interval that holds 0.5 says that this attack found nothing with so many patients, not that there is
    nothing to find.
    """
    check_model(model)
    from panfm.evaluate.embed import load_model
    from panfm.models import build_model
    from panfm.privacy.audit_membership import Place, audit_membership

    network, run = load_model(model, whitened=False)
    _refuse_task(model, run)
    if run.start and not before:
        raise DataError(f"{model}: was started from another model, expected its folder as --before")
    start = load_model(before, whitened=False)[0] if before else build_model(run)
    places = [Place.of(store) for store in open_stores(sites, run.streams, split="train")]
    attack = audit_membership(run, start.state_dict(), network.state_dict(), places, masks=masks)
    _write_json(json, asdict(attack))
    low, high = attack.auc.low, attack.auc.high
    typer.echo(f"{attack.members} members against {attack.others} others of the same sites")
    typer.echo(f"AUC {attack.auc.value:.3f} [{low:.3f}, {high:.3f}]; 0.5: the attack tells nothing")


@app.command("inversion")
def audit_inversion(
    model: Model,
    sites: _Sites,
    patients: Annotated[int, typer.Option(min=1, help="Patients that are attacked, sites in turn.")] = 8,
    json: _Json = None,
) -> None:
    """Compute images back from a gradient of the model; quality in dB (PSNR; 30 is close, 100 is exact).

    Attacks the next step: of one patient alone, as AdamW makes an update of it, in sums over patients and sites, and
    with noise. Beside it stand what a single grey and another patient's image would score. With the tokenizer
    `statistics` it is the means of blocks that come back, with `patch` the voxels. Failing here proves nothing: this is
    one attack, which needs no search.
    """
    check_model(model)
    from panfm.evaluate.embed import load_model
    from panfm.privacy.audit_inversion import audit_inversion

    network, run = load_model(model, whitened=False)
    _refuse_task(model, run)
    scenarios = audit_inversion(network, run, open_stores(sites, run.streams, split="train"), patients=patients)
    _write_json(json, [asdict(scenario) for scenario in scenarios])
    _print_inversion(scenarios)


def _refuse_task(model: Path, run: "RunConfig") -> None:
    """Raise ConfigError for a model that has learned labels: the attacks know losses of images alone."""
    if run.task is not None:
        raise ConfigError(f"{model}: has learned labels ([task]), expected a model of pre-training")


def _print_inversion(scenarios: Sequence["Scenario"]) -> None:
    from statistics import median

    from rich.console import Console
    from rich.table import Table

    table = Table("gradient of", "attack", "grey", "another patient", title="PSNR in dB, median over what is attacked")
    for column in table.columns[1:]:
        column.justify = "right"
    for scenario in scenarios:
        columns = (scenario.psnr, scenario.grey, scenario.other)
        table.add_row(scenario.name, *(f"{median(values):.1f}" for values in columns))
    Console().print(table)


def _write_json(path: Path | None, content: object) -> None:
    """Raises DataError if the file cannot be written."""
    from panfm.outputs import write_json

    try:
        if path is not None:
            write_json(path, content, indent=1)
    except OSError as error:
        raise DataError(f"--json {path}: cannot be written ({error.strerror})") from error
