"""`panfm ...`: one Typer app per group of commands.

Commands import what they need when they run, so that `panfm --help` answers at once, and read a run description before
they import torch, so that a mistake in it is told at once. An error meant for the user is printed line by line on
stderr and ends with exit status 1; a traceback is always a bug.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from panfm.errors import DataError, LedgerError, PanfmError

if TYPE_CHECKING:
    import click

    from panfm.data.check import SiteReport
    from panfm.evaluate.result import Score
    from panfm.privacy.audit_inversion import Scenario
    from panfm.privacy.ledger import Ledger


class _Group(TyperGroup):
    """Turns a PanfmError into its text and exit status 1."""

    def invoke(self, ctx: "click.Context") -> Any:
        try:
            return super().invoke(ctx)
        except PanfmError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from error


main = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pan-organ foundation models, federated.",
)
site_app = typer.Typer(no_args_is_help=True, help="For the operator of one site.")
cohort_app = typer.Typer(no_args_is_help=True, help="Data sets of simulated federations.")
main.add_typer(site_app, name="site")
main.add_typer(cohort_app, name="cohort")
ledger_app = typer.Typer(no_args_is_help=True, help="What a site has spent of its patients' privacy.")
main.add_typer(ledger_app, name="ledger")

_LEDGER_HELP = "Site folder, or run folder with site-level privacy."

audit_app = typer.Typer(no_args_is_help=True, help="Attacks that test what privacy promises. Nothing leaves.")
main.add_typer(audit_app, name="audit")

_SPLITS = ("train", "val", "test")
_RunOption = Annotated[Path | None, typer.Option("--run", help="Description of the run (TOML).")]


@site_app.command("init")
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


@site_app.command("check")
def site_check(
    site: Annotated[Path, typer.Argument(help="Site folder.")],
    run: _RunOption = None,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="List faulty rows and go on without them.")] = False,
) -> None:
    """Read every image, print who has what, then each fault on one line.

    With --quarantine the faulty rows are listed in SITE/quarantine.csv, and every run leaves them out until the list is
    written anew; exit status 0.
    """
    from panfm.config import load_run

    description = load_run(run) if run else None
    from panfm.data.check import check_site
    from panfm.data.manifest import read_quarantine

    streams, organs = (description.streams, description.organs) if description else (None, None)
    with _progress("reading images") as progress:
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
    table.add_row("any", *(str(sum(split == each for _, each in subjects)) for split in _SPLITS))
    Console().print(table)


@site_app.command("start")
def site_start(site: Annotated[Path, typer.Argument(help="Site folder.")]) -> None:
    """Run the site's worker until it is stopped: it answers handshakes and rounds at its socket, and nothing else."""
    import logging
    import os

    from panfm.site import Site
    from panfm.site.limits import limit_memory
    from panfm.site.tell import supernode_command
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


@site_app.command("dry-run")
def site_dry_run(
    site: Annotated[Path, typer.Argument(help="Site folder.")],
    run: Annotated[Path, typer.Option("--run", help="Description of the run (TOML).")],
) -> None:
    """Try one local step of a run: its time and memory, and all that would leave the site. Nothing leaves."""
    from panfm.config import load_run

    description = load_run(run)
    from panfm.site.dry_run import dry_run
    from panfm.site.tell import dry_run_lines

    for line in dry_run_lines(dry_run(site, description)):
        typer.echo(line)


@site_app.command("status")
def site_status(site: Annotated[Path, typer.Argument(help="Site folder.")]) -> None:
    """Whether the worker is at work, the rounds whose state is kept, and how much has left."""
    from panfm.config import load_site, site_path
    from panfm.site.tell import status_lines

    config = load_site(site)
    for line in status_lines(site, config, site_path(site, config.state_dir)):
        typer.echo(line)


@site_app.command("end")
def site_end(
    site: Annotated[Path, typer.Argument(help="Site folder.")],
    run: Annotated[str, typer.Argument(help="Id of the run, as `panfm site status` tells it.")],
) -> None:
    """End a run at this site for good: its questions are refused, and another run may begin."""
    from panfm.config import load_site, site_path
    from panfm.site.admission import end_run

    end_run(site_path(site, load_site(site).state_dir), run)
    typer.echo(f"run {run}: ended at this site")


@site_app.command("log")
def site_log(
    site: Annotated[Path, typer.Argument(help="Site folder.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the chain of hashes only, and print its end.")
    ] = False,
    noted: Annotated[
        str | None,
        typer.Option(help="An end of the chain that you wrote down earlier: it must still be in the record."),
    ] = None,
) -> None:
    """Every message that left the site, oldest first. Ends with status 1 where the record was tampered with.

    Lines that were changed or taken out break the chain. Lines cut off at its end, or a record written anew from some
    line on, do not: they are found with --noted.
    """
    from panfm.config import load_site, site_path
    from panfm.site.departures import Departures
    from panfm.site.tell import departure_line

    departures, ends = Departures(site_path(site, load_site(site).state_dir)), []
    for line in departures.lines():
        ends.append(line["chain"])
        if not verify:
            typer.echo(departure_line(line))
    if noted is not None and _chain_end(noted) not in ends:
        raise DataError(f"{departures.path}: the end noted is not in it, lines were cut off or written anew")
    count, end = len(ends), ends[-1] if ends else "nothing yet"
    typer.echo(f"{count} messages, unbroken; the chain ends with: {end}")


@cohort_app.command("make")
def cohort_make(
    folder: Annotated[Path, typer.Argument(help="New folder of the cohort.")],
    run: Annotated[Path, typer.Option("--run", help="Description of a run with a phantom cohort (TOML).")],
    preset: Annotated[str | None, typer.Option(help="Instead of the run's: transient or lasting.")] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the run's draw.")] = None,
    subjects: Annotated[int | None, typer.Option(min=1, help="Patients per site, instead of the run's.")] = None,
) -> None:
    """Write a phantom cohort as site folders of NIfTI or PNG files."""
    from panfm.config import load_run
    from panfm.config.cohort import ModalitiesCohortConfig, PhantomCohortConfig

    flags = {"preset": preset, "seed": seed}
    description = load_run(run, [f"cohort.{key}={value}" for key, value in flags.items() if value is not None])
    from panfm.data.modalities import write_modalities
    from panfm.data.phantom import write_cohort

    cohort = description.cohort
    if not isinstance(cohort, PhantomCohortConfig | ModalitiesCohortConfig):
        raise DataError(f'{run}: found no phantom cohort, expected cohort.kind = "phantom" or "modalities"')
    if subjects:
        sites = {name: site.model_copy(update={"subjects": subjects}) for name, site in cohort.sites.items()}
        cohort = cohort.model_copy(update={"sites": sites})
    with _progress("writing images") as progress:
        if isinstance(cohort, PhantomCohortConfig):
            write_cohort(folder, cohort, description.streams, progress)
        else:
            write_modalities(folder, cohort, description.streams, progress)
    typer.echo(f"{folder}: {len(cohort.sites)} sites and held-out subjects")


@ledger_app.command("show")
def ledger_show(folder: Annotated[Path, typer.Argument(help=_LEDGER_HELP)]) -> None:
    """Print what was promised, what is spent, on what, and what is not covered.

    Written for a data-protection officer. A site's ledger is shared by all runs on its patients, and is written before
    anything is sent. A run folder has one where the server added noise for its sites (table `server-privacy`). Note the
    end of the chain elsewhere: `panfm ledger verify --noted` finds with it whether entries were cut off.
    """
    from panfm.privacy.statement import statement

    entries = _ledger(folder).entries()
    for line in statement(entries):
        typer.echo(line)
    if entries:
        typer.echo(f"The chain ends with: {entries[-1]['hash']}")


@ledger_app.command("verify")
def ledger_verify(
    folder: Annotated[Path, typer.Argument(help=_LEDGER_HELP)],
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
    if noted is not None and ledger.check_noted(_chain_end(noted)):
        typer.echo(f"{ledger.path}: its anchor was missing and is written anew, as the end noted is in the ledger")
    entries = ledger.entries()
    typer.echo(f"{ledger.path}: {len(entries)} entries, each follows from the one before")
    typer.echo(f"The chain ends with: {entries[-1]['hash'] if entries else 'nothing yet'}")


@ledger_app.command("plan")
def ledger_plan(
    run: Annotated[Path, typer.Argument(help="Description of a private run (TOML).")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. train.rounds=3.")] = None,
    site: Annotated[Path | None, typer.Option(help="Site or run folder: on top of what its ledger holds.")] = None,
) -> None:
    """Epsilon of a run with its noise, and the noise with which it would spend its epsilon.

    Try other numbers with --set: privacy.epsilon=2, train.rounds=5, privacy.sample-rate=0.1. With --site, on top of
    what is spent there already.
    """
    from panfm.config import load_run

    description = load_run(run, overrides or ())
    from panfm.privacy.plan import plan

    for line in plan(description, _ledger(site).entries() if site else ()):
        typer.echo(line)


def _ledger(folder: Path) -> "Ledger":
    from panfm.config import load_run, load_site, site_path
    from panfm.privacy.ledger import run_ledger
    from panfm.site.spending import Account

    if (folder / "run.toml").is_file() and not (folder / "site.toml").is_file():
        if load_run(folder / "run.toml").server_privacy is None:
            raise LedgerError(f"{folder}: a run without server-privacy has no ledger, its sites do; name a site folder")
        return run_ledger(folder)
    site = load_site(folder)
    return Account(folder, site, site_path(folder, site.state_dir)).ledger


def _chain_end(text: str) -> str:
    """An end of a chain as somebody typed it. Raises DataError if it cannot be one: a slip is no tampering."""
    end = text.strip().lower()
    if len(end) != 64 or set(end) - set("0123456789abcdef"):
        raise DataError(f"--noted {text!r:.80}: expected the 64 characters 0-9 and a-f of an end of the chain")
    return end


_JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the findings here.")]
_Model = Annotated[Path, typer.Argument(help="Folder of a model: <run folder>/model.")]
_Sites = Annotated[list[Path], typer.Argument(help="Site folders.")]


@audit_app.command("step")
def audit_step(
    run: Annotated[Path, typer.Argument(help="Description of a private run (TOML).")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. train.rounds=3.")] = None,
    canaries: Annotated[int, typer.Option(min=8, help="Made-up patients.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Private steps.")] = 40,
    json: _JsonOption = None,
) -> None:
    """Run the real private step on canaries and bound its epsilon from below, at 95 % confidence.

    Canaries are made-up patients, each with a gradient along an axis of its own; a coin decides who is there. Who reads
    the noised sums guesses, and too many right guesses refute the claim. A correct step gives a bound of about a fifth
    of the claim or less; one above the claim is a bug, and the exit status is 1. Without noise or clipping a thousand
    canaries prove an epsilon of 5, so the audit tells most at a claim of 1 or 2: choose noise and steps accordingly. A
    step that is wrong by a factor of two can pass.
    """
    from panfm.config import load_run

    description = load_run(run, overrides or ())
    from panfm.privacy.audit_step import DELTA, audit_step

    found = audit_step(description, canaries=canaries, steps=steps)
    _write_json(json, asdict(found))
    typer.echo(f"{found.steps} steps, each canary in one with chance 0.25")
    typer.echo(f"claimed: epsilon {found.claim:.3f} at delta {DELTA:g}")
    typer.echo(f"guesses: {found.correct} of {found.guesses} right, about {found.canaries} canaries")
    typer.echo(f"proved: epsilon is at least {found.lower_bound:.3f} (95 % confidence)")
    if found.lower_bound > found.claim:
        typer.echo("the step does NOT do what it claims", err=True)
        raise typer.Exit(1)


@audit_app.command("membership")
def audit_membership(
    model: _Model,
    sites: _Sites,
    before: Annotated[
        Path | None, typer.Option("--before", help="Model folder that the run started from; the seed's when left out.")
    ] = None,
    masks: Annotated[int, typer.Option(min=1, help="Masks over which a loss is averaged.")] = 8,
    json: _JsonOption = None,
) -> None:
    """How well a finished model tells who was trained on: an AUC with its 95 % interval; 0.5 is not at all.

    A site's train split stands against its other splits. The attack looks at how far training lowered each patient's
    loss. An interval that holds 0.5 says that this attack found nothing with so many patients, not that there is
    nothing to find.
    """
    from panfm.data.cache import open_store
    from panfm.evaluate.embed import load_model
    from panfm.models import build_model
    from panfm.privacy.audit_membership import Place, audit_membership

    network, run = load_model(model)
    if run.start and not before:
        raise DataError(f"{model}: was started from another model, expected its folder as --before")
    start = load_model(before)[0] if before else build_model(run)
    with _progress("reading images") as progress:
        stores = [
            open_store(site, run.streams, progress=lambda _, done, total: progress(done, total)) for site in sites
        ]
    places = [Place.of(store) for store in stores]
    found = audit_membership(run, start.state_dict(), network.state_dict(), places, masks=masks)
    _write_json(json, asdict(found))
    low, high = found.auc.low, found.auc.high
    typer.echo(f"{found.members} members against {found.others} others of the same sites")
    typer.echo(f"AUC {found.auc.value:.3f} [{low:.3f}, {high:.3f}]; 0.5: the attack tells nothing")


@audit_app.command("inversion")
def audit_inversion(
    model: _Model,
    sites: _Sites,
    patients: Annotated[int, typer.Option(min=1, help="Patients that are attacked, sites in turn.")] = 8,
    json: _JsonOption = None,
) -> None:
    """What images can be computed back from a gradient of the model, in dB (PSNR; 30 is close, 100 is exact).

    Attacks the next step: of one patient alone, as AdamW makes an update of it, in sums over patients and sites, and
    with noise. Beside it stand what a single grey and another patient's image would score. With the tokenizer
    `statistics` it is the means of blocks that come back, with `patch` the voxels. Failing here proves nothing: this is
    one attack, which needs no search.
    """
    from panfm.data.cache import open_store
    from panfm.evaluate.embed import load_model
    from panfm.privacy.audit_inversion import audit_inversion

    network, run = load_model(model)
    with _progress("reading images") as progress:
        stores = [
            open_store(site, run.streams, progress=lambda _, done, total: progress(done, total)) for site in sites
        ]
    found = audit_inversion(network, run, stores, patients=patients)
    _write_json(json, [asdict(each) for each in found])
    _print_inversion(found)


def _print_inversion(found: Sequence["Scenario"]) -> None:
    from statistics import median

    from rich.console import Console
    from rich.table import Table

    table = Table("gradient of", "attack", "grey", "another patient", title="PSNR in dB, median over what is attacked")
    for column in table.columns[1:]:
        column.justify = "right"
    for each in found:
        table.add_row(each.name, *(f"{median(values):.1f}" for values in (each.psnr, each.grey, each.other)))
    Console().print(table)


def _write_json(path: Path | None, content: object) -> None:
    """Raises DataError if the file cannot be written."""
    from panfm.files import json_text, write_atomic

    try:
        if path is not None:
            write_atomic(path, f"{json_text(content, indent=1)}\n".encode())
    except OSError as error:
        raise DataError(f"--json {path}: cannot be written ({error.strerror})") from error


@main.command("embed")
def embed(
    model: Annotated[Path, typer.Argument(help="Folder of a model: <run folder>/model.")],
    site: Annotated[Path, typer.Argument(help="Site folder.")],
    out: Annotated[Path, typer.Option(help="Feature file to write (.npz).")],
) -> None:
    """Write the frozen features of a site's subjects."""
    from panfm.data.cache import open_store
    from panfm.evaluate.embed import embed_site, load_model, write_features

    network, run = load_model(model)
    with _progress("reading images") as progress:
        store = open_store(site, run.streams, progress=lambda _, done, total: progress(done, total))
    done = 0
    with _progress("embedding subjects") as progress:

        def on_batch(size: int) -> None:
            nonlocal done
            done += size
            progress(done, len(store.subjects))

        table = embed_site(model, network, store, on_batch)
    write_features(out, table)
    typer.echo(f"{out}: {len(table.subjects)} subjects, {table.features.shape[1]} features")


@main.command("probe")
def probe(
    features: Annotated[list[Path], typer.Argument(help="Feature files written by `panfm embed`.")],
    labels: Annotated[list[Path], typer.Option(help="Label table; may be given again, e.g. one per site.")],
    fit_split: Annotated[str, typer.Option(help="Split to fit on.")] = "train",
    test_split: Annotated[str, typer.Option(help="Split to test on.")] = "test",
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples of the test subjects.")] = 1000,
) -> None:
    """How well a linear reader finds each label in frozen features: AUC, or R2 of a number, with 95 % interval."""
    from panfm.data.labels import read_label_table
    from panfm.evaluate.embed import read_features
    from panfm.evaluate.table import probe_features

    tables = [read_label_table(path) for path in labels]
    scores, notes = probe_features(
        [read_features(path) for path in features],
        tables,
        fit_split=fit_split,
        test_split=test_split,
        bootstrap=bootstrap,
    )
    _print_scores(scores)
    for note in notes:
        typer.echo(note)


@main.command("report")
def report(run_folder: Annotated[Path, typer.Argument(help="Run folder; the run may still be going on.")]) -> None:
    """Print a run's tables and write report.html into its folder."""
    from rich.console import Console

    from panfm.report import print_tables, read_run, write_report

    run = read_run(run_folder)
    print_tables(run, Console())
    typer.echo(f"report: {write_report(run)}")


@main.command("export")
def export(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    to: Annotated[str, typer.Option(help="safetensors, monai-bundle, dense-vit or onnx.")],
    out: Annotated[Path, typer.Option(help="New folder; for onnx, new file.")],
    streams: Annotated[
        str, typer.Option(help="For monai-bundle and onnx: the inputs, e.g. brain-mr,heart-ct; all when left out.")
    ] = "",
    licence: Annotated[str | None, typer.Option(help="Licence of the weights, for the metadata.")] = None,
) -> None:
    """Write a run's model for use elsewhere, read it back, and compare it with the original.

    safetensors: the weights as they are, read by `panfm embed`. dense-vit: a plain ViT of this library; a
    Director-Experts model goes through its directors. monai-bundle: a folder for MONAI. onnx: one file, one input per
    stream and `present`, needs the extra `onnx` of panfm. Each says streams, spacing, intensity rules, sites, rounds,
    epsilon, licence and intended use.
    """
    from panfm.export import export_run

    names = [name.strip() for name in streams.split(",") if name.strip()]
    difference = export_run(run_folder, to, out, streams=names, licence=licence)
    typer.echo(f"{out}: read back, embeds as the run's model does (largest difference {difference:.1g})")


def _print_scores(scores: Sequence["Score"]) -> None:
    from rich.console import Console
    from rich.table import Table

    from panfm.report.table import score_text

    table = Table("label", "metric", "value [95 % interval]")
    for score in scores:
        table.add_row(score.group, score.metric, score_text(score))
    Console().print(table)


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, gone when done; called with (done, total)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
