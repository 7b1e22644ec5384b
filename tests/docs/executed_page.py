"""Runs the blocks of code of a tutorial in order, as a reader would type them, and the cells of a notebook.

A page may name smaller sizes for the tests in a comment on the line above a block, `<!-- tests: 40 => 12; 10 => 1 -->`,
or why a block is not run, `<!-- not run: needs a second machine -->`. A notebook's cell has its smaller sizes under
`tests` in its metadata. Each text to be replaced must stand in the code exactly once.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbclient
import nbformat

RUN = ("bash", "python")
"""Languages of blocks that are run; blocks of other languages show output, or the content of a file."""
_BLOCK = re.compile(
    r"^(?:<!-- (?P<key>tests|not run): (?P<words>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    code: str
    """Code of the block, with the smaller sizes that the page names for tests."""
    line: int
    """Line number, in the page, of the first line of code."""
    reason: str = ""
    """Reason why the block is not run; empty if it is."""

    @property
    def is_run(self) -> bool:
        return self.language in RUN and not self.reason


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page."""
    listed = []
    for match in _BLOCK.finditer(text):
        key, words, code = match["key"], match["words"] or "", match["code"]
        if key == "tests":
            code = replaced(code, dict(pair.split(" => ") for pair in words.split("; ")))
        line = text.count("\n", 0, match.start("code")) + 1
        listed.append(Block(match["language"], code, line, words if key == "not run" else ""))
    return listed


def replaced(code: str, sizes: Mapping[str, str]) -> str:
    """Replace sizes in code. Raises ValueError: a text to be replaced does not occur exactly once."""
    for old, new in sizes.items():
        if code.count(old) != 1:
            raise ValueError(f"{old!r} stands {code.count(old)} times in the code, expected once:\n{code}")
        code = code.replace(old, new)
    return code


def run_page(page: Path, folder: Path) -> dict[str, Any]:
    """Run a page's blocks in a folder; returns the names that its Python blocks leave.

    Each bash block is a shell of its own, which ends at the first error; the Python blocks share one set of names.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page.read_text()):
        if not block.is_run:
            continue
        if block.language == "bash":
            _run_shell(block, page, folder)
        else:
            lines = "\n" * (block.line - 1)
            with contextlib.chdir(folder):
                exec(compile(lines + block.code, str(page), "exec"), names)
    return names


def _run_shell(block: Block, page: Path, folder: Path) -> None:
    words = ["bash", "-euo", "pipefail", "-c", block.code]
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    told = f"{page.name}:{block.line}: status {done.returncode}\n{block.code}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, told


def environment() -> dict[str, str]:
    """The environment of a reader who has activated the virtual environment of these tests."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run_notebook(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook's cells in a folder; returns it with outputs. Raises CellExecutionError: a cell failed."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = replaced(cell.source, cell.metadata.get("tests", {}))
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    home = {"IPYTHONDIR": str(folder / ".ipython"), "JUPYTER_RUNTIME_DIR": str(folder / ".jupyter")}
    return client.execute(env=environment() | home)
