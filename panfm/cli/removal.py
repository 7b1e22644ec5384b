"""Removal of files that a user agrees to, for `panfm site clean` and `python -m server clean`."""

from collections.abc import Sequence
from pathlib import Path

import typer


def confirm_removal(paths: Sequence[Path], *, yes: bool) -> None:
    """Remove files once the user agrees, and tell how much was freed.

    Args:
        paths: Files, listed by their folder before anything is removed.
        yes: Whether the user has agreed already.
    """
    if not paths:
        typer.echo("nothing to remove")
        return
    sizes: dict[Path, int] = {}
    for path in paths:
        sizes[path.parent] = sizes.get(path.parent, 0) + path.stat().st_size
    for folder, size in sizes.items():
        typer.echo(f"{folder}: {size / 2**20:.1f} MiB")
    if not yes and not typer.confirm(f"remove {len(paths)} files?"):
        raise typer.Exit(1)
    for path in paths:
        path.unlink(missing_ok=True)
    typer.echo(f"removed {len(paths)} files, {sum(sizes.values()) / 2**20:.1f} MiB")
