"""README and docs: short enough, links that lead somewhere, files, functions and tests that exist."""

import ast
import itertools
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml

import panfm
from panfm.config.masking import MaskingConfig
from panfm.training.policies import MaskingPolicy
from simulations.documents.figures import figures
from simulations.documents.kept_results import KeptResult
from simulations.documents.result_tables import filled, marks, tables
from tests.contract.test_layers import LEVELS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
ANCHOR = re.compile(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)")
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
FILE = re.compile(r"`((?:panfm|strategies|server|client|simulations|tests|configs|docs)/[\w/.-]*)`")
NAME = re.compile(r"`([A-Z]\w+\.[a-z_]\w*|[A-Za-z_]\w*)`")
ARCHITECTURE = ROOT / "docs" / "architecture.md"
RESULTS_README = ROOT / "docs" / "results" / "README.md"
RESULTS = sorted(RESULTS_README.parent.glob("*.md"))
FIGURE = ROOT / "docs" / "figures" / "manifest-row-to-tensor.svg"


def test_readme_is_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    targets = LINK.findall(page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_anchor_is_a_heading(page: Path) -> None:
    links = [(page.parent / path if path else page, name) for path, name in ANCHOR.findall(page.read_text())]
    assert [name for path, name in links if name not in _anchors(path.read_text())] == []


def test_every_figure_is_shown_on_a_page() -> None:
    shown = {name for page in PAGES for name in re.findall(r"!\[[^]]*\]\([^)]*figures/([^)]+)\)", page.read_text())}
    assert {path.name for path in (ROOT / "docs" / "figures").iterdir()} == shown
    for path in (ROOT / "docs" / "figures").glob("*.svg"):
        root = ElementTree.parse(path).getroot()
        assert root.find("{http://www.w3.org/2000/svg}title") is not None, path.name


def test_the_figures_are_those_of_the_kept_results() -> None:
    """`make figures` draws them anew."""
    for name, text in figures(ROOT / "docs" / "results" / "data").items():
        assert (ROOT / "docs" / "figures" / name).read_text() == text


def test_kept_results_hold_no_path_of_a_machine() -> None:
    for path in (ROOT / "docs" / "results" / "data").glob("*.json"):
        assert not re.findall(r'"(/[^"]*)"', path.read_text()), path.name


def test_the_tables_between_marks_are_those_of_the_kept_results() -> None:
    """`make figures` writes them anew."""
    written = tables(ROOT / "docs" / "results" / "data")
    pages = [path.read_text() for path in (*RESULTS, ROOT / "docs" / "scaling.md")]
    assert sorted(name for page in pages for name in marks(page)) == sorted(written)
    for page in pages:
        assert filled(page, written) == page


def test_every_results_page_says_where_its_numbers_come_from() -> None:
    """docs/results/README.md leads to each page with a table, and each such page names a command of simulations."""
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", RESULTS_README.read_text()))
    with_tables = [path for path in RESULTS if "\n| " in path.read_text() and path != RESULTS_README]
    assert with_tables
    assert {path.name for path in with_tables} <= linked
    for path in with_tables:
        text = path.read_text().replace("\n", " ")
        assert re.search(r"python -m simulations (study|bench|run) [\w/]", text), path.name


def test_the_readme_tells_what_the_kept_results_say() -> None:
    result = json.loads((ROOT / "docs" / "results" / "data" / "demo.json").read_text())
    values = {(row["metric"], row["arm"]): row["values"] for row in result["results"]}
    readme = (ROOT / "README.md").read_text()
    for arm in ("federated", "best-site", "untrained", "statistics"):
        cells = [f"{values[metric, arm][0]:.3f}"[1:] for metric in ("auc", "auc_100")]
        assert re.search(rf"^\| .*\| \**{cells[0]}\** \| \**{cells[1]}\** \|$", readme, re.MULTILINE), (arm, cells)
    for arm in ("federated", "best-site", "untrained", "tokenizer"):
        assert f"{np.mean(values['auc', arm]):.2f}"[1:] in readme.partition("## Try it")[0], arm


def test_the_readme_tells_what_the_results_say() -> None:
    readme, pages = (ROOT / "README.md").read_text(), ROOT / "docs" / "results"
    few = KeptResult.read(pages / "data" / "few-labels.json")
    local, with_floors = (np.mean(few.of("auc_mean_40", arm)) for arm in ("local", "federated-floors"))
    assert f"AUC of {with_floors:.2f} on real".replace("0.", ".") in readme.replace("\n", " ")
    assert f"against {local:.2f} of a hospital's own".replace("0.", ".") in readme.replace("\n", " ")
    rounds = json.loads((pages / "data" / "bench-round-overhead.json").read_text())["ratios"]
    assert f"A round costs {rounds['local_over_plain'] * 100 - 100:.0f} % more" in readme


def test_the_citation_has_what_its_format_needs() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == panfm.__version__
    assert citation["license"] == "Apache-2.0"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    missing = [f"{path}::{name}" for path, name in TEST.findall(page.read_text()) if not _has_test(ROOT / path, name)]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        pytest.skip("tells of files that were")
    assert [path for path in FILE.findall(page.read_text()) if not (ROOT / path).exists()] == []


def test_every_function_in_the_architecture_is_defined_in_a_file_of_its_line() -> None:
    pairs = [(FILE.findall(line), NAME.findall(line)) for line in _without_code(ARCHITECTURE.read_text()).splitlines()]
    assert sum(bool(files and names) for files, names in pairs) > 15
    assert [name for files, names in pairs for name in names if files and name not in _definitions(files)] == []


def test_the_architecture_has_the_levels_of_the_library() -> None:
    rows = re.findall(r"^\| [1-6] \|([^|]*)\|$", ARCHITECTURE.read_text(), re.MULTILINE)
    levels = [{Path(path).name.removesuffix(".py") for path in FILE.findall(row)} for row in rows]
    assert levels == [set(level) for level in reversed(LEVELS)]


def test_every_function_in_the_figure_is_defined_in_the_file_above_it() -> None:
    texts = [text for text in ElementTree.parse(FIGURE).iter() if text.get("class") in ("file", "name")]
    pairs = [
        (file.text, name.text)
        for file, name in itertools.pairwise(texts)
        if (file.get("class"), name.get("class")) == ("file", "name")
    ]
    assert len(pairs) == sum(text.get("class") == "name" for text in texts) > 20
    assert [(file, name) for file, name in pairs if name not in _definitions([str(file)])] == []
    page = ARCHITECTURE.read_text()
    assert [file for file, _ in pairs if f"`{file}`" not in page] == []


def test_the_plug_in_of_the_architecture_works() -> None:
    [code] = re.findall(r"```python\n(.*?)```", ARCHITECTURE.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    names: dict[str, type[MaskingPolicy]] = {}
    exec(compile(code, "docs/architecture.md", "exec"), names)
    policy = names["RootPolicy"](MaskingConfig(), ["brain", "heart"])
    scores = policy.scores(torch.tensor([[0.25, 4.0]]), 1, 0, torch.Generator())
    assert scores.tolist() == [[0.5, 2.0]]
    assert policy.is_guided


def test_the_glossary_has_fewer_than_15_words() -> None:
    rows = [line for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if line.startswith("|")]
    assert len(rows) - 2 < 15


def test_links_and_names_are_found_in_a_text() -> None:
    text = "[a](b.md) [c](https://d.org) [e](f/g.md#part) `tests/contract/test_documents.py::test_x`"
    assert LINK.findall(text) == ["b.md", "f/g.md"]
    assert TEST.findall(text) == [("tests/contract/test_documents.py", "test_x")]
    assert not _has_test(ROOT / "tests/contract/test_documents.py", "test_x")
    assert not _has_test(ROOT / "tests/absent.py", "")
    text = "`panfm/files.py` `lock`, `HashChain.append`\n```\n`absent`\n```\n`run.toml` `panfm site log`"
    assert FILE.findall(text) == ["panfm/files.py"]
    assert NAME.findall(_without_code(text)) == ["lock", "HashChain.append"]
    assert "lock" in _definitions(["panfm/files.py"])
    assert "RoundFiles.write" in _definitions(["panfm/files.py"])
    assert "HashChain.append" not in _definitions(["panfm/files.py"])


def _anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", _without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def _has_test(path: Path, name: str) -> bool:
    if not path.is_file():
        return False
    functions = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    return not name or name in functions


def _without_code(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def _definitions(files: list[str]) -> set[str]:
    """Functions, classes, methods and constants that some Python files define; methods as `Class.method`."""
    names: set[str] = set()
    for file in files:
        if not file.endswith(".py"):
            continue
        for node in ast.parse((ROOT / file).read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
            if isinstance(node, ast.Assign):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names
