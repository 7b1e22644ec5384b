"""`panfm report`: tables and a page of one run."""

from pathlib import Path
from typing import Annotated

import typer


def report(run_folder: Annotated[Path, typer.Argument(help="Run folder; the run may still be going on.")]) -> None:
    """Print a run's tables and write report.html into its folder."""
    from panfm.report.run_files import read_run

    run = read_run(run_folder)
    from rich.console import Console

    from panfm.report.console_tables import print_tables
    from panfm.report.report_page import write_report

    print_tables(run, Console())
    typer.echo(f"report: {write_report(run)}")
