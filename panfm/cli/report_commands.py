"""`panfm report`: tables and a page of one run."""

from pathlib import Path
from typing import Annotated

import typer


def report(run_folder: Annotated[Path, typer.Argument(help="Run folder; the run may still be going on.")]) -> None:
    """Print a run's tables and write report.html into its folder."""
    from panfm.report.run import read_run

    run = read_run(run_folder)
    from rich.console import Console

    from panfm.report.html import write_report
    from panfm.report.table import print_tables

    print_tables(run, Console())
    typer.echo(f"report: {write_report(run)}")
