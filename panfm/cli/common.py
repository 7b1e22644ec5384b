"""Parts of all groups of commands: errors as lines, `--version`, `--set`."""

import errno
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from panfm import __version__
from panfm.errors import PanfmError, reason

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
