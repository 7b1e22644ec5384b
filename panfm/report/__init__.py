"""What a run folder tells a person: tables for the console, one HTML page that works offline."""

from panfm.report.html import write_report
from panfm.report.run import Run, read_run
from panfm.report.table import print_tables

__all__ = ["Run", "print_tables", "read_run", "write_report"]
