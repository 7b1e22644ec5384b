"""Reads the commands and Python blocks of README and docs, and how tests run them (`page_commands.toml`).

A page's code is in fenced blocks, or indented by four spaces or more. A block without a language is one of shell
commands if one of its lines begins with a known program; every line of it is then a command.
"""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        ROOT / "examples" / "plug-in" / "README.md",
        *sorted(path for path in ROOT.glob("docs/**/*.md") if path.parent.name != "reference"),
    )
}
"""Path below the root -> page; reference pages are made from the code."""
TUTORIALS = "docs/tutorials/"
"""Pages whose blocks run as they stand (`executed_page.py`)."""
LANGUAGES = ("bash", "python", "toml", "csv", "text")
_PROGRAM = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:(?:\.venv|/opt/\w+)/bin/)?"
    r"(panfm(?:-server)?|python3?|make|pip|flwr|flower-\w+|nvidia-\w+|dcm\w+|docker|git|systemctl|curl|tensorboard|"
    r"configs/\S+\.sh|chown|chmod|cp|cat|sed|mkdir|source|export|tar|sha256sum|runuser|install|podman)(?= |$)"
)
_CONTROL = re.compile(r"for .*; do|if .*; then|do|done|else|fi")
_COMMENT = re.compile(r"(?:^|\s+)#.*|\s{3,}.*")


@dataclass(frozen=True)
class Step:
    """A command line, or a Python block, of a page."""

    line: int
    """Line number in the page."""
    text: str
    """The command in one line without its comment, or the code."""
    is_python: bool = False


@dataclass(frozen=True)
class _Block:
    language: str
    line: int
    code: str


@dataclass(frozen=True)
class NotRun:
    """Commands that are not run as they stand."""

    commands: list[str]
    """Commands, or beginnings of Python blocks, as on the pages; `*` stands for any text."""
    reason: str
    run_by: dict[str, str]
    """File that runs the same smaller -> text in it that shows so; empty if none does."""

    def covers(self, command: str) -> bool:
        return any(matches(pattern, command) for pattern in self.commands)


@dataclass(frozen=True)
class Rules:
    """Settings by which tests run the commands of pages."""

    options: dict[str, str]
    """First words of a command -> options that tests add."""
    names: dict[str, dict[str, str]]
    """Page -> text in its commands and Python blocks -> text in its place."""
    not_run: list[NotRun]

    @classmethod
    def read(cls) -> "Rules":
        table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
        listed = [NotRun(entry["commands"], entry["reason"], entry.get("run-by", {})) for entry in table["not-run"]]
        return cls(table["options"], table["names"], listed)

    def is_run(self, step: Step) -> bool:
        return not any(entry.covers(step.text) for entry in self.not_run)

    def runnable(self, page: str, step: Step) -> str:
        """The command or code of a step as tests run it: with names of the test's folder, and more options."""
        text = step.text
        for old, new in self.names.get(page, {}).items():
            text = text.replace(old, new.replace("{root}", str(ROOT)))
        if step.is_python:
            return text
        added = [options for words, options in self.options.items() if f"{text} ".startswith(f"{words} ")]
        return " ".join([text, *added])

    @cached_property
    def patterns(self) -> list[str]:
        return [pattern for entry in self.not_run for pattern in entry.commands]


def matches(pattern: str, command: str) -> bool:
    """Whether a command is that of a pattern, in which `*` stands for any text."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), command, re.DOTALL) is not None


def steps(text: str) -> list[Step]:
    """All commands and Python blocks of a page, in their order; examples with `>>>` are left to doctest."""
    listed: list[Step] = []
    for block in code_blocks(text):
        if block.language == "python":
            if not block.code.startswith(">>>"):
                listed.append(Step(block.line, block.code, is_python=True))
        elif block.language == "bash" or (not block.language and _is_shell(block.code)):
            listed += _commands(block)
    return listed


def code_blocks(text: str) -> Iterator[_Block]:
    """Yield the fenced and the indented blocks of a page."""
    fence, begun, lines = None, 0, list[str]()
    for number, line in enumerate([*text.splitlines(), ""], 1):
        is_fence, is_indented = line.lstrip().startswith("```"), line.startswith("    ")
        if (is_fence or (fence is None and not is_indented)) and lines:
            yield _Block(fence or "", begun, "\n".join(lines))
            lines = []
        if is_fence:
            fence = line.strip().removeprefix("```") if fence is None else None
        elif fence is not None or is_indented:
            begun = begun if lines else number
            lines.append(line)


def _is_shell(code: str) -> bool:
    return any(_PROGRAM.match(line.strip()) for line in code.splitlines())


def _commands(block: _Block) -> Iterator[Step]:
    number, before = block.line, ""
    for at, line in enumerate(block.code.splitlines(), block.line):
        number = number if before else at
        whole = before + line.strip()
        before = whole[:-1] if whole.endswith("\\") else ""
        command = _COMMENT.sub("", whole)
        if not before and command and not _CONTROL.fullmatch(command):
            yield Step(number, command)


def is_known(step: Step) -> bool:
    """Whether a command begins with a program that these pages may name."""
    return step.is_python or _PROGRAM.match(step.text) is not None
