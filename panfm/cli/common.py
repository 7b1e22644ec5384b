"""Parts that several groups of commands share: errors as lines, progress bars, common arguments."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from panfm import __version__
from panfm.errors import DataError, PanfmError, reason
from panfm.files import check_place

if TYPE_CHECKING:
    import click


Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. train.rounds=3.")]


def _print_version(*, wanted: bool) -> None:
    if wanted:
        typer.echo(f"panfm {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version", callback=lambda wanted: _print_version(wanted=wanted), is_eager=True, help="Print the version."
    ),
]
NotedEnd = Annotated[
    str | None,
    typer.Option(help="An end of the chain that you wrote down earlier: it must still be in the file."),
]


class ErrorLines(TyperGroup):
    """Turns a PanfmError, or an error of the file system, into one line and exit status 1."""

    def invoke(self, ctx: "click.Context") -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except PanfmError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            typer.echo(f"{error.filename}: {reason(error)}" if error.filename else reason(error), err=True)
            raise typer.Exit(1) from error


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr until the block ends; what is yielded is called with (done, total)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def check_output(path: Path) -> None:
    """Check before any work that a file can be written. Raises DataError: it cannot, or the path is a folder's."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        check_place(path.parent)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({reason(error)}), expected a file in a folder of yours") from error


def chain_end(text: str) -> str:
    """Check the form of a chain's end that an operator typed. Raises DataError: a typing error is not tampering."""
    end = text.strip().lower()
    if len(end) != 64 or set(end) - set("0123456789abcdef"):
        raise DataError(f"--noted {text!r:.80}: expected the 64 characters 0-9 and a-f of an end of the chain")
    return end
