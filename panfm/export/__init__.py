"""A run's model for use elsewhere, one format per file; each is read back and compared before it takes its name."""

from panfm.export.run import FORMATS, export_run

__all__ = ["FORMATS", "export_run"]
