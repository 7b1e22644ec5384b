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
from typer.core import TyperGroup

from panfm.cli.common import ErrorLines, Version
from panfm.errors import ConfigError
from panfm.files import make_files_private

_GROUPS = ("site", "ledger", "audit", "weights")
_SIMULATE = "simulations.simulate_command"
"""Outside this package: a hospital has no simulations."""
_COMMANDS = {
    "split": "panfm.cli.data_commands",
    "plan": "panfm.cli.plan_commands",
    "simulate": _SIMULATE,
    "finetune": "panfm.cli.finetune_commands",
}
_COMMANDS |= dict.fromkeys(("embed", "whiten", "probe", "report", "export"), "panfm.cli.model_commands")


class CommandsOnDemand(ErrorLines):
    """Imports the file of a group when one of its commands is asked for."""

    def __init__(self, **options: Any) -> None:
        """Name the commands, in the order of the help."""
        super().__init__(**options)
        self.commands = {name: click.Command(name) for name in (*_COMMANDS, *_GROUPS)}

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command or group; None for an unknown name."""
        if cmd_name not in self.commands:
            return None
        if cmd_name == "site":
            return SiteCommands(name="site", help="For the operator of one site.", no_args_is_help=True)
        try:
            file = import_module(_COMMANDS.get(cmd_name, f"panfm.cli.{cmd_name}_commands"))
        except ModuleNotFoundError as error:
            if error.name != _SIMULATE.partition(".")[0]:
                raise
            return _not_installed(cmd_name)
        group = typer.main.get_group(file.app)
        if cmd_name not in _GROUPS:
            return group.get_command(ctx, cmd_name)
        group.name = cmd_name
        return group


class SiteCommands(TyperGroup):
    """Imports the worker's command alone for `start`, and the operator's commands for all others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order of the help."""
        return [*_group("panfm.cli.site_commands").list_commands(ctx), "start"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None for an unknown name."""
        file = "panfm.cli.worker_command" if cmd_name == "start" else "panfm.cli.site_commands"
        return _group(file).get_command(ctx, cmd_name)


def _group(file: str) -> TyperGroup:
    return typer.main.get_group(import_module(file).app)


def _not_installed(name: str) -> click.Command:
    """A command in the place of one whose package is not there."""

    def refuse(**_: object) -> None:
        raise ConfigError(f"{name}: not installed, expected: pip install 'panfm[simulation]' panfm-simulation")

    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    return click.Command(name, callback=refuse, help="Needs panfm-simulation.", context_settings=settings)


main = typer.Typer(cls=CommandsOnDemand, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@main.callback()
def _panfm(_version: Version = False) -> None:
    """Pan-organ foundation models, federated."""
    make_files_private()
