"""`panfm plan`: from site folders to a run description."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from panfm.cli.command_parts import no_nan, progress_bar
from panfm.errors import DataError, one_line

if TYPE_CHECKING:
    from panfm.planning.plan import Plan

app = typer.Typer(no_args_is_help=True)
_WIDEST = 400
"""Columns of the table, at most."""


@app.command()
def plan(
    sites: Annotated[list[Path], typer.Argument(help="Site folders.")],
    out: Annotated[Path, typer.Option(help="Run description to write (TOML); a new file.")],
    holdout: Annotated[Path | None, typer.Option(help="Folder of held-out subjects, made as a site's.")] = None,
    minutes: Annotated[
        float, typer.Option(min=0.1, max=100_000.0, callback=no_nan, help="Time for the run on this machine.")
    ] = 10.0,
) -> None:
    """Read the headers of all images, propose a run and write its description: about ten lines.

    Streams with spacing, shape and patch, the model's size, batch size and number of rounds are proposed; memory,
    seconds and bytes of a round are told, by a step that is tried on random images. Everything can be changed by hand.
    """
    if out.exists():
        raise DataError(f"{out}: exists, expected a new file")
    if not os.access(out.absolute().parent, os.W_OK | os.X_OK):
        raise DataError(f"{out}: cannot be written, expected a file in a folder that is there and may be written to")
    from panfm.config import load_site

    for folder in sites:
        load_site(folder)
    from panfm.files import write_atomic
    from panfm.planning.plan import make_plan

    with progress_bar("reading headers") as progress:
        proposed = make_plan(sites, name=out.stem, holdout=holdout, minutes=minutes, progress=progress)
    _print(proposed)
    try:
        write_atomic(out, proposed.text.encode())
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror})") from error
    typer.echo(f"{out}: written; next: panfm simulate {out}")


def _print(plan: "Plan") -> None:
    from rich.console import Console
    from rich.table import Table

    from panfm.data.joins import counted
    from panfm.planning.stream_proposal import PERCENTILES, percentiles

    headings = [f"{number} %" for number in PERCENTILES]
    table = Table("stream", "images", *headings, "spacing mm", "shape", "patch", "tokens", title="voxels of the images")
    for name, stream in plan.survey.streams.items():
        sizes = [_axes(row) for row in percentiles(stream.sizes)]
        config = plan.run.streams[name]
        tokens = str(math.prod(config.grid))
        shape = [_axes(config.spacing_mm), _axes(config.shape), _axes(config.patch), tokens]
        table.add_row(name, str(len(stream.sizes)), *sizes, *shape)
    Console(width=Console(width=_WIDEST).measure(table).maximum).print(table)  # no column is cut off
    train, cost = plan.run.train, plan.cost
    subjects = ", ".join(f"{site} {count}" for site, count in plan.survey.train_subjects.items())
    typer.echo(f"training subjects: {subjects}")
    typer.echo(
        f"model {plan.run.model.size}, {cost.parameters:,} parameters; batches of {train.batch_size}, "
        f"{train.local_steps} steps a round, {counted(train.rounds, 'round')}"
    )
    typer.echo(
        f"a step {cost.step_seconds:.3f} s and at most {cost.memory_gib:.2f} GiB beside images; a round of all sites "
        f"{cost.round_seconds:.1f} s, {cost.bytes_up:,} bytes from them"
    )
    for note in plan.notes:
        typer.echo(one_line(f"note: {note}", limit=1000))


def _axes(numbers: Iterable[float]) -> str:
    return "x".join(f"{number:.3g}" for number in numbers)
