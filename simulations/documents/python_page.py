"""Writes the reference page of public Python names and of plug-in bases, from signatures and docstrings."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import partial
from typing import Any

import panfm
from panfm.config.objective import ObjectiveConfig
from panfm.data.readers import ImageReader
from panfm.models.backbone import Backbone
from panfm.notebook.loaded_model import Encoder
from panfm.notebook.public_names import PUBLIC_NAMES
from panfm.notebook.run_tables import RunTables
from panfm.notebook.token_grid import TokenGrid
from panfm.training.objectives.interface import Objective
from panfm.training.policies import MaskingPolicy
from server.tracking import RoundLogger
from simulations.cohorts.cohort_source import CohortSource
from simulations.documents.markdown import paragraphs, prose
from strategies.group_means import BufferedMean, GroupMean

RETURNED = (Encoder, TokenGrid, RunTables)
"""Classes of the objects that public functions return, besides `panfm.Model`."""
BASES = (
    ObjectiveConfig,
    Objective,
    MaskingPolicy,
    Backbone,
    ImageReader,
    GroupMean,
    BufferedMean,
    RoundLogger,
    CohortSource,
)
"""Base classes and protocols of plug-ins."""


def page() -> str:
    """Write the page of Python names as Markdown."""
    parts = ["# Python\n", "Examples that run as tests are in [Python and notebooks](../python.md).\n", "## panfm\n"]
    for name in PUBLIC_NAMES:
        parts += _entry(f"panfm.{name}", getattr(panfm, name))
    parts.append("## What they return\n")
    for kind in RETURNED:
        parts += _entry(kind.__name__, kind)
    parts.append("## Bases of plug-ins\n")
    for base in BASES:
        parts += _entry(f"{base.__module__}.{base.__name__}", base, with_methods=False)
    return "\n".join(parts)


def _entry(name: str, item: Any, *, with_methods: bool = True) -> list[str]:
    """Write the entry of one function or class: heading, docstring, and for a class its attributes and methods.

    Args:
        with_methods: Whether methods have their whole docstring, or only its first paragraph.
    """
    lines = [f"### `{name}{_signature(item)}`\n", f"{_text(item)}\n"]
    if not inspect.isclass(item):
        return lines
    lines += [f"* `{field}`: {prose(text)}" for field, text in attributes(item).items()]
    for member, value in members(item):
        if with_methods and not isinstance(value, property):
            lines.append(f"\n#### `{name}.{member}{_signature(value)}`\n\n{_text(value)}\n")
        else:
            lines.append(f"* `{member}{_signature(value)}`: {_first_line(value)}")
    return [*lines, ""]


def attributes(kind: type) -> dict[str, str]:
    """Attribute that a class of this project declares -> the docstring below it; empty text without one."""
    [node] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    declared: dict[str, str] = {}
    last = ""
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            last = statement.target.id
            declared[last] = ""
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and last:
            declared[last] = str(statement.value.value)
        else:
            last = ""
    return {name: text for name, text in declared.items() if not name.startswith("_")}


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties that a class defines itself, in the order of its file."""
    for name, value in vars(kind).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(function):
            yield name, value if isinstance(value, property) else function


def _signature(item: Any) -> str:
    """Parameters with their defaults, such as `(path, stream=None)`; empty for a class or a property."""
    if inspect.isclass(item) or isinstance(item, property):
        return ""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty, default=_shown(parameter.default))
        for name, parameter in inspect.signature(item).parameters.items()
        if name not in ("self", "cls")
    ]
    return str(inspect.Signature(parameters))


def _shown(default: Any) -> Any:
    """Default value as the signature shows it: a function is shown as `...`."""
    return ... if inspect.isfunction(default) else default


def _text(item: Any) -> str:
    """Docstring as Markdown; for a decorator that registers plug-ins, that of the function that it wraps."""
    return paragraphs(inspect.getdoc(item.func if isinstance(item, partial) else item) or "")


def _first_line(item: Any) -> str:
    return paragraphs((inspect.getdoc(item) or "").partition("\n\n")[0])
