"""Run folders as a finished run leaves them."""

from tests.unit.export.conftest import write_run

__all__ = ["write_run"]
