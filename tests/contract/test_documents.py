"""README and docs: short enough, links that lead somewhere, tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)")
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def test_readme_is_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    targets = LINK.findall(page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    missing = [f"{path}::{name}" for path, name in TEST.findall(page.read_text()) if not _has_test(ROOT / path, name)]
    assert missing == []


def test_links_and_names_are_found_in_a_text() -> None:
    text = "[a](b.md) [c](https://d.org) [e](f/g.md#part) `tests/contract/test_documents.py::test_x`"
    assert LINK.findall(text) == ["b.md", "f/g.md"]
    assert TEST.findall(text) == [("tests/contract/test_documents.py", "test_x")]
    assert not _has_test(ROOT / "tests/contract/test_documents.py", "test_x")
    assert not _has_test(ROOT / "tests/absent.py", "")


def _has_test(path: Path, name: str) -> bool:
    if not path.is_file():
        return False
    functions = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    return not name or name in functions
