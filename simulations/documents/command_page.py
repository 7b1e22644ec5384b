"""Writes the reference page of all commands, from the click commands themselves."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import typer

from panfm.cli import main as panfm
from server.coordinator import app as server
from simulations.__main__ import app as simulations
from simulations.__main__ import command_of, files_of
from simulations.documents.markdown import cell, paragraphs, table

TOOLS: dict[str, typer.Typer] = {
    "panfm": panfm,
    "python -m server": server,
    "python -m simulations": simulations,
}
_ROOT = Path(__file__).resolve().parents[2]
_PASSED_ON = {"study": "studies", "bench": "bench"}
"""Commands of `python -m simulations` that run the command of a named file -> package of these files."""


@dataclass(frozen=True)
class Command:
    """One click command, with the words that a user types to call it."""

    words: str
    command: click.Command

    @property
    def is_group(self) -> bool:
        """Whether the command has subcommands."""
        return isinstance(self.command, click.Group)

    @property
    def parameters(self) -> list[click.Parameter]:
        """Arguments and options, without `--help`."""
        return [parameter for parameter in self.command.params if parameter.name != "help"]


def commands() -> list[Command]:
    """List every command of every tool, studies and benches included; a group comes before its subcommands."""
    listed = [command for words, app in TOOLS.items() for command in _below(words, typer.main.get_command(app))]
    for verb, package in _PASSED_ON.items():
        for name, path in files_of(package).items():
            words = f"python -m simulations {verb} {name}"
            listed.append(Command(words, typer.main.get_command(command_of(package, path))))
    return listed


def _below(words: str, command: click.Command) -> Iterator[Command]:
    yield Command(words, command)
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            if inner := command.get_command(context, name):
                yield from _below(f"{words} {name}", inner)


def page() -> str:
    """Write the page of commands as Markdown."""
    parts = [
        "# Commands\n",
        "Every command answers `--help` with the same text. Commands are in `.venv/bin`, which `make install` makes. "
        "A command ends with status 0 only if what it was asked for is so; an error is one line and status 1.\n",
    ]
    for command in commands():
        depth = "##" if command.words in TOOLS else "###"
        parts.append(f"{depth} `{command.words}`\n")
        parts.append(f"{paragraphs(command.command.help or '')}\n")
        if rows := [_row(parameter) for parameter in command.parameters]:
            parts.append(table(("argument or option", "default", "meaning"), rows))
    return "\n".join(parts)


def _row(parameter: click.Parameter) -> tuple[str, str, str]:
    if isinstance(parameter, click.Option):
        names = [*parameter.opts, *parameter.secondary_opts]
        value = "" if parameter.is_flag else f" {(parameter.metavar or parameter.type.name).upper()}"
        value = value.removesuffix(" RANGE")
        spelled = ", ".join(f"`{name}{value}`" for name in names)
    else:
        spelled = f"`{parameter.human_readable_name.upper().replace('|', ' or ')}`"
    return spelled, cell(_default(parameter)), cell(meaning(parameter))


def meaning(parameter: click.Parameter) -> str:
    """Help text of an argument or option; empty if it has none."""
    return str(getattr(parameter, "help", None) or "")


def _default(parameter: click.Parameter) -> str:
    if parameter.required:
        return "needed"
    value = parameter.default
    if value is None or value is False or callable(value) or value in ((), [], ""):
        return ""
    if isinstance(value, Path) and value.is_relative_to(_ROOT):
        value = value.relative_to(_ROOT)
    return f"`{value}`"
