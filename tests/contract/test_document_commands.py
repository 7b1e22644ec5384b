"""Every command in README and docs exists and has the options that the page uses."""

import re
import shlex
from importlib.util import find_spec

import click
import pytest

from simulations.documents.command_page import Command, commands
from tests.docs.page_commands import PAGES, ROOT, steps

TOOLS = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:(?:\.venv|/opt/\w+)/bin/)?(panfm|python -m \S+|make) ")
TREE = {command.words: command for command in commands()}


def lines_of(text: str) -> list[str]:
    """Command lines of a page's blocks of code that begin with one of our tools."""
    return [step.text for step in steps(text) if TOOLS.match(f"{step.text} ")]


def complaint(line: str) -> str:
    """Describe the mistake in a command line; empty if there is none."""
    tool = TOOLS.match(f"{line} ")
    assert tool
    words = shlex.split(f"{tool[1]} {line[tool.end() :]}".replace("&", " ").replace(";", " "))
    if words[0] == "make":
        return _make(words[1:])
    if words[0] == "python" and f"python -m {words[2]}" not in TREE:
        return "" if find_spec(words[2]) else f"no module {words[2]}"
    return _parse(*_command(words))


def _make(words: list[str]) -> str:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    unknown = [word for word in words if "=" not in word and word not in targets]
    return f"no target {unknown[0]}" if unknown else ""


def _command(words: list[str]) -> tuple[Command, list[str]]:
    """The longest known command at the start of a line, and the words behind it."""
    length = max(length for length in range(1, len(words) + 1) if " ".join(words[:length]) in TREE)
    return TREE[" ".join(words[:length])], words[length:]


def _parse(command: Command, words: list[str]) -> str:
    if command.is_group and words[:1] not in ([], ["--help"], ["--version"]):
        return (
            "" if all(f"{command.words} {part}" in TREE for part in words[0].split("|")) else f"no command {words[0]}"
        )
    if command.words.rpartition(" ")[2] in ("study", "bench") and words and not words[0].isupper():
        return f"no {command.words.rpartition(' ')[2]} {words[0]}"
    options = {name: option for option in command.parameters for name in option.opts if name.startswith("-")}
    left = iter(words)
    for word in left:
        name, equals, _ = word.partition("=")
        if not name.startswith("--") or name == "--help":
            continue
        if name not in options:
            return f"no option {name}"
        if not equals and isinstance(options[name], click.Option) and not options[name].is_flag:
            next(left, None)
    return ""


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_exists(page):
    text = PAGES[page].read_text()
    assert [(line, told) for line in lines_of(text) if (told := complaint(line))] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_the_text_of_a_page_exists(page):
    inline = re.findall(
        r"`((?:panfm|python -m (?:server|simulations)) [a-z][^`]*)`", PAGES[page].read_text().replace("\n", " ")
    )
    assert [(line, told) for line in inline if (told := complaint(line))] == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("panfm site check SITE --run run.toml", ""),
        ("panfm site chek SITE", "no command chek"),
        ("panfm embed runs/x a.nii.gz --steram brain-mr", "no option --steram"),
        ("panfm embed runs/x --out=a.npz", ""),
        ("python -m server start|status", ""),
        ("python -m server start|halt", "no command start|halt"),
        ("python -m simulations study demo --seeds 3 --json x.json", ""),
        ("python -m simulations study demo --draws 3", "no option --draws"),
        ("python -m simulations study domo", "no study domo"),
        ("python -m tests.absent x", "no module tests.absent"),
        ("make demo PYTHON=python3.12", ""),
        ("make dmo", "no target dmo"),
    ],
)
def test_mistakes_are_found(line, told):
    assert complaint(line) == told
