"""The generated reference: every key, command, option and name has an entry with a meaning, and docs/ has the pages."""

import typing
from pathlib import Path

import click
import pytest
from pydantic import BaseModel, Field

from panfm.config import RunConfig, SiteConfig
from panfm.config.base import Config
from panfm.data.label_kinds import LabelRule
from panfm.data.left_out import LISTED
from panfm.data.manifest import COLUMNS
from panfm.registry import OBJECTIVES
from server.tracking_config import TrackingConfig
from simulations.cohorts import COHORTS
from simulations.documents import command_page, description_page, file_page, python_page, reference
from simulations.documents.markdown import cell, paragraphs
from tests.contract.test_help import commands as commands_of_help

PAGES = Path(__file__).parents[3] / "docs" / "reference"


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return reference.pages()


def test_docs_have_the_pages_of_this_code(pages):
    """`make reference` writes them anew."""
    kept = {path.name: path.read_text() for path in PAGES.glob("*.md")}
    assert sorted(kept) == sorted(pages)
    assert [name for name in pages if kept[name] != pages[name]] == []


def test_every_key_of_every_description_has_an_entry_with_a_meaning(pages):
    roots = {
        "run-toml.md": [
            RunConfig,
            TrackingConfig,
            *map(OBJECTIVES.load, OBJECTIVES.built_in),
            *map(COHORTS.load, COHORTS.built_in),
        ],
        "site-toml.md": [SiteConfig],
        "labels-toml.md": [LabelRule],
    }
    for name, models in roots.items():
        keys = {field.alias or key for model in all_models(models) for key, field in model.model_fields.items()}
        assert len(keys) > 2
        assert [key for key in sorted(keys) if f"| `{key}` |" not in pages[name]] == []
    sections = [
        *description_page.run_sections(),
        *description_page.site_sections(),
        *description_page.label_rule_sections(),
    ]
    assert [(section.path, key.name) for section in sections for key in section.keys if not key.meaning] == []
    assert [section.path for section in sections if not section.meaning] == []


def all_models(models: list[type[BaseModel]]) -> set[type[BaseModel]]:
    """Models, and all that their fields hold."""
    known: set[type[BaseModel]] = set()
    left = list(models)
    while left:
        annotation = left.pop()
        left += [part for part in typing.get_args(annotation) if not isinstance(part, str)]
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in known:
            known.add(annotation)
            left += [field.annotation for field in annotation.model_fields.values()]
    return known


def test_a_key_without_a_meaning_is_found():
    class Described(Config):
        """A table."""

        told: int = 1
        """What it is."""
        untold: int = Field(default=2, gt=0, le=5)

    [section] = description_page._sections(Described)
    assert [(key.name, key.values, key.default, key.meaning) for key in section.keys] == [
        ("told", "whole number", "`1`", "What it is."),
        ("untold", "whole number, 1 to 5", "`2`", ""),
    ]


def test_every_command_and_option_has_an_entry_with_a_meaning(pages):
    listed = {command.words: command for command in command_page.commands()}
    tools = {"panfm": "panfm", "server": "python -m server", "simulations": "python -m simulations"}
    words = {f"{tools[tool]} {name}".strip() for tool in tools for name in commands_of_help(tool)}
    assert words <= set(listed)
    assert {"python -m simulations study demo", "python -m simulations bench sgm-overhead"} <= set(listed)
    page = pages["commands.md"]
    for name, command in listed.items():
        assert f"# `{name}`" in page
        assert command.command.help, name
        for parameter in command.parameters:
            assert command_page.meaning(parameter), (name, parameter.name)
            if isinstance(parameter, click.Option):
                assert all(f"`{option}" in page for option in parameter.opts), (name, parameter.name)


def test_every_column_has_an_entry():
    assert set(file_page.MANIFEST) == set(COLUMNS)
    assert tuple(file_page.QUARANTINE) == LISTED


def test_every_public_name_and_member_has_a_docstring(pages):
    page = pages["python-names.md"]
    for name in python_page.PUBLIC_NAMES:
        assert f"### `panfm.{name}" in page
    for kind in (*python_page.RETURNED, *python_page.BASES):
        members = dict(python_page.members(kind))
        assert [name for name, value in members.items() if not python_page._text(value)] == []


def test_markdown_of_a_docstring():
    text = """Do it to <name>.

Args:
    a: One thing,
        on two lines.
    b: Two.
Returns:
    Text
    on lines.

>>> f(1)
2"""
    expected = """Do it to &lt;name>.

Args:

* a: One thing, on two lines.
* b: Two.

Returns:

* Text on lines.

```python
>>> f(1)
2
```"""
    assert paragraphs(text) == expected
    assert cell("`<a>` or <b> | c") == r"`<a>` or &lt;b> \| c"
