"""`panfm ...`: one file per group of commands.

A group is imported when one of its commands is asked for, and commands import what they need when they run: `panfm
--help` answers at once, and a worker holds no more code than it uses. Descriptions are read before torch is imported,
so that a mistake is told at once. An error meant for the user is printed line by line on stderr and ends with exit
status 1; a traceback is always a bug.
"""

from importlib import import_module
from typing import Any

import click
import typer

from panfm.cli.common import ErrorLines

_GROUPS = ("site", "ledger", "audit", "weights")
_MODEL_COMMANDS = ("embed", "whiten", "probe", "report", "export")
_DATA_COMMANDS = ("split",)


class CommandsOnDemand(ErrorLines):
    """Imports the file of a group when one of its commands is asked for."""

    def __init__(self, **options: Any) -> None:
        """Name the commands, in the order of the help."""
        super().__init__(**options)
        self.commands = {name: click.Command(name) for name in (*_DATA_COMMANDS, *_MODEL_COMMANDS, *_GROUPS)}

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command or group; None for an unknown name."""
        if cmd_name not in self.commands:
            return None
        of_data = "data_commands" if cmd_name in _DATA_COMMANDS else "model_commands"
        file = f"{cmd_name}_commands" if cmd_name in _GROUPS else of_data
        group = typer.main.get_group(import_module(f"panfm.cli.{file}").app)
        if cmd_name not in _GROUPS:
            return group.get_command(ctx, cmd_name)
        group.name = cmd_name
        return group


main = typer.Typer(cls=CommandsOnDemand, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@main.callback()
def _panfm() -> None:
    """Pan-organ foundation models, federated."""
