"""Writes reference pages, or figures and tables of results: `python -m simulations.documents reference|figures`."""

from pathlib import Path
from typing import Annotated

import typer

from simulations.documents.figures import figures as all_figures
from simulations.documents.reference import pages as all_pages
from simulations.documents.result_tables import filled, marks, tables

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS = DOCS / "results"
_Out = Annotated[Path, typer.Option(help="Folder to write into.")]


@app.command()
def reference(out: _Out = DOCS / "reference") -> None:
    """Write the reference pages: descriptions, commands, Python names, tables and files."""
    _write(out, all_pages())


@app.command()
def figures(
    out: _Out = DOCS / "figures",
    results: Annotated[
        Path, typer.Option(help="Folder of the results pages, with the result files in data/.")
    ] = RESULTS,
) -> None:
    """Draw figures, and write tables between the marks of results pages, from the results kept in docs/results/data."""
    _write(out, all_figures(results / "data"))
    written = tables(results / "data")
    paths = [*sorted(results.glob("*.md")), *sorted(results.parent.glob("scaling.md"))]
    for path in paths:
        if marks(text := path.read_text(encoding="utf-8")):
            _write(path.parent, {path.name: filled(text, written)})


def _write(folder: Path, texts: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        typer.echo(folder / name)


if __name__ == "__main__":
    app()
