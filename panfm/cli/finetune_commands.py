"""Command `panfm finetune`: trains a run's model on a few labels to classify, predict a number, or segment."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from panfm.cli.command_parts import progress_bar
from panfm.cli.model_arguments import check_model, tell_left_out
from panfm.errors import ConfigError
from panfm.evaluate.model_folder import model_folder

if TYPE_CHECKING:
    from panfm.evaluate.result import Score
    from panfm.finetune.finetune_settings import FinetuneSettings

app = typer.Typer(no_args_is_help=True)


@app.command()
def finetune(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Run folder, or folder of a model. Not with --resume.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Site folder with images; give it again to pool patients of several.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="labels.csv:COLUMN (a table in the site folder, or a path), or segmentation (masks that the column "
            "mask of the manifest names)."
        ),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            help="Column with the time to the event that --task's column tells, or to the end of follow-up: fits a Cox "
            "model of survival."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for checkpoint, model, masks and result.")] = None,
    parts: Annotated[
        str,
        typer.Option(
            help="Parts trained together with the head: head (none), all, norms, vectors, last-blocks:N, "
            "attention-projections:N, lora:N or lora:N:RANK; N counts blocks from the last."
        ),
    ] = "all",
    augment: Annotated[
        bool,
        typer.Option(help="Augment images and masks at every step. Turn off if a label depends on left or right."),
    ] = True,
    steps: Annotated[int, typer.Option(help="Most steps; validation may stop training earlier.")] = 300,
    batch_size: Annotated[int, typer.Option(help="Images of a segmentation, or visits of patients, per step.")] = 8,
    learning_rate: Annotated[
        float, typer.Option(help="Learning rate of a label head; a segmentation decoder's is ten times as large.")
    ] = 1e-3,
    layer_decay: Annotated[float, typer.Option(help="Learning rate of a layer over that of the next one.")] = 0.75,
    streams: Annotated[str, typer.Option(help="Streams to read, e.g. brain-mr,heart-ct; all when left out.")] = "",
    stream: Annotated[str | None, typer.Option(help="Stream to segment, if several have masks.")] = None,
    pooling: Annotated[str | None, typer.Option(help="Pooling instead of the run's, as in panfm embed.")] = None,
    patients: Annotated[
        int | None, typer.Option(help="Patients whose labels are learned from, at least 2, validation included.")
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Start from the run's untrained model, for comparison.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the split, of the order of images, and of the head.")] = 0,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the fine-tuning in this folder, with its own settings.")
    ] = None,
) -> None:
    """Train a run's model on labels or masks, and test it on patients that it has not seen.

    panfm finetune runs/demo --data sites/clinic --task labels.csv:stroke --out stroke

    Labels may be yes or no, classes or numbers, as panfm probe distinguishes them, or an event with a time (--time).
    The manifest's splits are used; if nobody is in val or test, patients are drawn at random, and a line says so.
    Training stops when the validation loss no longer falls. For comparison a linear probe and nearest neighbours on the
    frozen model learn from the same patients. The folder holds result.json, model/ for panfm.load, embed and export,
    and the masks of the test images. Fine-tuning is local and adds no noise: a model with a privacy claim is refused.
    """
    from panfm.finetune.finetune_settings import FinetuneSettings, new_folder_for, parse_parts

    if resume is not None:
        if run is not None or data or task is not None or out is not None:
            raise ConfigError("--resume: found RUN, --data, --task or --out beside it, expected the folder alone")
        _continue(resume)
        return
    missing = {"RUN": run, "--data": data, "--task": task, "--out": out}
    if names := [name for name, value in missing.items() if not value]:
        raise ConfigError(f"{names[0]}: missing, expected: panfm finetune RUN --data SITE --task TASK --out FOLDER")
    assert run is not None
    assert data is not None
    assert task is not None
    assert out is not None
    given = {
        "model": str(run.absolute()),
        "data": tuple(str(folder.absolute()) for folder in data),
        "task": _task_from_anywhere(task, data),
        "time": time,
        "streams": tuple(name.strip() for name in streams.split(",") if name.strip()),
        "masked_stream": stream,
        "parts": parse_parts(parts),
        "pooling": pooling,
        "patients": patients,
        "from_scratch": from_scratch,
        "augment": augment,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "layer_decay": layer_decay,
        "seed": seed,
    }
    settings = FinetuneSettings.of_options(given)
    folder = new_folder_for(out)
    _check(settings)
    _train(settings, folder)


def _task_from_anywhere(task: str, data: "Sequence[Path]") -> str:
    """Make the path of a label table absolute if it is relative to the working directory, for `--resume` elsewhere."""
    from panfm.finetune.task_description import parse_task

    label = parse_task(task)
    if label is None or any((folder / label[0]).exists() for folder in data) or not Path(label[0]).exists():
        return task
    return f"{Path(label[0]).absolute()}:{label[1]}"


def _check(settings: "FinetuneSettings") -> None:
    """Report mistakes in options and descriptions before torch is imported."""
    from panfm.config import load_site
    from panfm.evaluate.pooling_option import parse_pooling
    from panfm.finetune.task_description import parse_task

    if parse_task(settings.task) is None and settings.time is not None:
        raise ConfigError(
            f"--time: found {settings.time!r:.80} beside a segmentation, expected --task labels.csv:EVENT"
        )
    if settings.pooling is not None:
        parse_pooling(settings.pooling)
    check_model(model_folder(Path(settings.model)))
    for folder in settings.data:
        load_site(Path(folder))


def _continue(folder: Path) -> None:
    from panfm.finetune.finetune_settings import settings_to_resume

    settings = settings_to_resume(folder)
    _check(settings)
    _train(settings, folder)


def _train(settings: "FinetuneSettings", folder: Path) -> None:
    """Read everything, train, and print the result."""
    from panfm.config import load_run
    from panfm.finetune.finetune_job import FinetuneJob

    with progress_bar("reading images") as progress:
        job = FinetuneJob.open(settings, folder, progress)
    tell_left_out(list(map(Path, settings.data)), load_run(model_folder(Path(settings.model)) / "run.toml").streams)
    task, patients = job.data.task, job.data.num_patients()
    told = f" ({', '.join(task.outputs)})" if len(task.outputs) > 1 else ""
    typer.echo(f"{task.name}: {task.kind}{told}; patients: " + ", ".join(f"{n} {name}" for name, n in patients.items()))
    for note in job.data.notes:
        typer.echo(note)
    with progress_bar("training") as progress:
        result = job.run(progress)
    _print_scores(result.scores)
    for note in result.notes[len(job.data.notes) :]:
        typer.echo(note)
    typer.echo(f"{folder / 'model'}: fine-tuned model, for panfm.load, panfm embed and panfm export")


def _print_scores(scores: "Sequence[Score]") -> None:
    from rich.console import Console
    from rich.table import Table

    from panfm.report.console_tables import score_text

    table = Table("", "of", "metric", "value [95 % interval]")
    for score in scores:
        table.add_row(score.arm, score.group, score.metric, score_text(score))
    Console(markup=False).print(table)
