"""Tutorials: every block is run, or says why not; each page runs to its end on real images."""

import os
import shutil
from pathlib import Path

import pytest

from panfm.evaluate.embed import read_features
from tests.docs.executed_page import RUN, blocks, replaced, run_page

ROOT = Path(__file__).parents[2]
PAGES = sorted(ROOT.glob("docs/tutorials/*.md"))
FIRST = ROOT / "docs" / "tutorials" / "own-data.md"
REAL = os.environ.get("PANFM_REAL_DATA", "")
needs_images = pytest.mark.skipif(not REAL, reason="PANFM_REAL_DATA is not set: no real images")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_run_or_shown(page: Path) -> None:
    listed = blocks(page.read_text())
    assert any(block.is_run for block in listed)
    assert {block.language for block in listed} <= {*RUN, "text", "toml"}
    assert page.read_text().count("```") == 2 * len(listed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_compile(page: Path) -> None:
    for block in blocks(page.read_text()):
        if block.language == "python":
            compile(block.code, page.name, "exec")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the first tutorial leaves: files, sites, hold-out, a run and its description."""
    folder = tmp_path_factory.mktemp("tutorial")
    run_page(FIRST, folder)
    return folder


@needs_images
@pytest.mark.slow
def test_own_data(federation: Path) -> None:
    assert (federation / "runs" / "own" / "report.html").stat().st_size > 0
    assert len(read_features(federation / "unseen.npz").subjects) > 5


@needs_images
@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != FIRST], ids=lambda page: page.stem)
def test_a_page_goes_on_from_the_first(page: Path, federation: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(federation, tmp_path / "copy", ignore=shutil.ignore_patterns("cohorts"))
    description = folder / "run.toml"  # it names the sites by whole paths
    description.write_text(description.read_text().replace(str(federation), str(folder)))
    run_page(page, folder)


PAGE = """
# A page
```bash
echo one > out.txt
```
<!-- tests: 40 => 2; steps => step -->
```python
from pathlib import Path
written = Path("out.txt").read_text().strip() + " 40 steps"
```
<!-- not run: no such command -->
```bash
no-such-command
```
```text
printed
```
"""


def test_a_page_is_run_in_order_with_smaller_sizes(tmp_path: Path) -> None:
    listed = blocks(PAGE)
    assert [(block.language, block.line, block.is_run) for block in listed] == [
        ("bash", 4, True),
        ("python", 8, True),
        ("bash", 13, False),
        ("text", 16, False),
    ]
    (tmp_path / "page.md").write_text(PAGE)
    assert run_page(tmp_path / "page.md", tmp_path)["written"] == "one 2 step"


@pytest.mark.parametrize(("code", "error"), [("false\ntrue", "page.md:2: status 1"), ("echo $ABSENT", "ABSENT")])
def test_a_shell_ends_at_the_first_error(code: str, error: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"```bash\n{code}\n```\n")
    with pytest.raises(AssertionError, match=error):
        run_page(tmp_path / "page.md", tmp_path)


@pytest.mark.parametrize("code", ["none", "40 and 40"])
def test_a_size_stands_in_the_code_once(code: str) -> None:
    with pytest.raises(ValueError, match="'40' stands"):
        replaced(code, {"40": "2"})
