"""Parts that some commands share: progress bars, the place of an output, the end of a chain, numbers."""

import errno
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from panfm.errors import DataError, reason
from panfm.outputs import check_place

NotedEnd = Annotated[
    str | None,
    typer.Option(help="An end of the chain that you wrote down earlier: it must still be in the file."),
]


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


def no_nan(value: float) -> float:
    """Return the number of an option. Raises BadParameter: it is NaN, which passes every comparison with a range."""
    if math.isnan(value):
        raise typer.BadParameter("nan, expected a number")
    return value
