"""`python -m server start|status|watch|keep|resume|kit|register|metrics|...`: for the coordinator of a federation."""

import sys

import typer

from panfm.errors import PanfmError
from panfm.extras import needs_extra
from server.coordinator import app

if __name__ == "__main__":
    try:
        with needs_extra("server"):
            app(prog_name="python -m server")
    except PanfmError as error:
        typer.echo(str(error), err=True)
        sys.exit(1)
