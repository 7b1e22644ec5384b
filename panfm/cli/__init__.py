"""`panfm ...`: one file per group of commands.

Commands import what they need when they run, so that `panfm --help` answers at once, and read descriptions before they
import torch, so that a mistake is told at once. An error meant for the user is printed line by line on stderr and ends
with exit status 1; a traceback is always a bug.
"""

import typer

from panfm.cli import audit_commands, ledger_commands, model_commands, site_commands, weights_commands
from panfm.cli.common import ErrorLines

main = typer.Typer(
    cls=ErrorLines,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pan-organ foundation models, federated.",
)
main.add_typer(site_commands.app, name="site")
main.add_typer(ledger_commands.app, name="ledger")
main.add_typer(audit_commands.app, name="audit")
main.add_typer(weights_commands.app, name="weights")
main.command("embed")(model_commands.embed)
main.command("whiten")(model_commands.whiten)
main.command("probe")(model_commands.probe)
main.command("report")(model_commands.report)
main.command("export")(model_commands.export)
