"""Writes text as Markdown: table cells, tables and paragraphs."""

import re
from collections.abc import Iterable, Sequence

_ENTRY = re.compile(r"    [A-Za-z_][\w, ]*: ")
"""First line of an entry under `Args:`, `Raises:` and the like."""


def cell(text: str) -> str:
    """Join text to one line that is safe inside a table."""
    return prose(text).replace("|", r"\|")


def prose(text: str) -> str:
    """Join text to one line, with `<` and `*` escaped outside of code."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;").replace("*", r"\*") for part in parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table from cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def paragraphs(docstring: str) -> str:
    """Turn a docstring into Markdown: examples and indented blocks become code, `Args:` and the like lists."""
    blocks = re.split(r"\n\s*\n", docstring.strip())
    return "\n\n".join(_block(block.rstrip()) for block in blocks)


def _block(block: str) -> str:
    if block.startswith(">>>"):
        return f"```python\n{block}\n```"
    if block.startswith("    "):
        return block
    parts: list[list[str]] = []
    for line in block.splitlines():
        if re.fullmatch(r"[A-Z]\w+:", line):
            parts.append([line])
        elif parts and re.match(r"    (?! )", line) and (_ENTRY.match(line) or parts[-1][0].endswith(":")):
            parts.append([f"* {line.strip()}"])
        elif parts:
            parts[-1].append(line)
        else:
            parts.append([line])
    lines = [" ".join(" ".join(part).split()) for part in parts]
    return "\n".join(
        f"* {prose(line[2:])}" if line.startswith("* ") else f"\n{prose(line)}\n" for line in lines
    ).strip()
