"""Whatever is written about a command, an argument or an option is there when somebody asks for help."""

import re

import click
import pytest
import typer
from typer.testing import CliRunner

from panfm.cli import main
from server.coordinator import app as server
from simulations.__main__ import app as simulations

TOOLS = {"panfm": main, "server": server, "simulations": simulations}


def commands(tool: str) -> dict[str, click.Command]:
    """Every command of a tool by its words, but those that pass `--help` on."""
    found, open_ = {}, {"": typer.main.get_command(TOOLS[tool])}
    while open_:
        name, command = open_.popitem()
        if isinstance(command, click.Group):
            context = context_of(command)
            words = command.list_commands(context)
            open_ |= {f"{name} {word}".strip(): command.get_command(context, word) for word in words}
        if not context_of(command).ignore_unknown_options:
            found[name] = command
    return found


def context_of(command: click.Command) -> click.Context:
    return click.Context(command, **command.context_settings)


def plain(text: str) -> str:
    """Without frames, and where lines break."""
    return " ".join(re.sub(r"[^!-~ ]", " ", text).split())


@pytest.mark.parametrize(("tool", "name"), [(tool, name) for tool in TOOLS for name in commands(tool)])
def test_nothing_is_lost(tool, name):
    command = commands(tool)[name]
    shown = plain(CliRunner().invoke(TOOLS[tool], [*name.split(), "--help"], env={"COLUMNS": "300"}).output)
    assert plain(command.help) in shown
    for parameter in command.params:
        assert plain(parameter.help or "nothing is said") in shown, parameter.name
