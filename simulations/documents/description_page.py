"""Writes reference pages of TOML files, from the pydantic models that read them.

The meaning of a key is the docstring of its field; that of a table is the docstring of its model. A table such as
`[sharing.groups.NAME]` repeats keys of the table that contains it; such a key without docstring has the same meaning.
"""

import json
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from panfm.config import RunConfig, SiteConfig
from panfm.data.label_kinds import LabelRule
from panfm.registry import BACKBONES, MASKING_POLICIES, MEANS, OBJECTIVES, Registry
from server.tracking_config import LOGGERS, TrackingConfig
from simulations.cohorts import COHORTS
from simulations.documents.markdown import cell, prose, table

Model = type[BaseModel]
_CHOSEN: Mapping[str, Registry] = {point.key: point for point in (OBJECTIVES, COHORTS)}
"""Key whose value chooses a class that describes a table -> registry of these classes."""
_NAMED: Mapping[str, Registry] = {
    "backbone": BACKBONES,
    "policy": MASKING_POLICIES,
    "mean": MEANS,
    "loggers": LOGGERS,
}
"""Key whose values are names of plug-ins -> registry of these plug-ins."""
_PLAIN = 1e12
"""A larger bound only reflects the number's type, so the page does not show it."""


@dataclass(frozen=True)
class Key:
    """Name, allowed values, default and meaning of one key of a table."""

    name: str
    values: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """One table of a file, or one of the forms that a table may have, with its keys."""

    path: str
    """Dotted name of the table, with NAME where the user chooses a name; empty for the top of the file."""
    form: str
    """The `key = "value"` that chooses this form; empty if the table has only one form."""
    meaning: str
    keys: tuple[Key, ...]


def run_sections() -> list[Section]:
    """All tables of a run description."""
    return _sections(RunConfig)


def site_sections() -> list[Section]:
    """All tables of site.toml."""
    return _sections(SiteConfig)


def label_rule_sections() -> list[Section]:
    """All tables of labels.toml."""
    return _sections(LabelRule, "COLUMN")


def page(title: str, about: str, sections: list[Section]) -> str:
    """Write the page of one TOML file as Markdown."""
    parts = [f"# {title}\n", f"{about}\n"]
    for section in sections:
        name = f"[{section.path}]" if section.path else "Top of the file"
        parts.append(f"## {name}{f' with {section.form}' if section.form else ''}\n")
        parts.append(f"{prose(section.meaning)}\n")
        rows = [(f"`{key.name}`", cell(key.values), cell(key.default), cell(key.meaning)) for key in section.keys]
        parts.append(table(("key", "values", "default", "meaning"), rows) if rows else "No key.\n")
    return "\n".join(parts)


def _sections(model: Model, path: str = "") -> list[Section]:
    """List the table of a model and all tables in it; a model that two keys use is listed once."""
    return list(_walk(model, path, "", {}, {}))


def _walk(model: Model, path: str, form: str, around: Mapping[str, str], places: dict[Model, str]) -> Iterator[Section]:
    """Yield the table of a model, then the tables in it.

    Args:
        form: What chooses this form of the table.
        around: Meanings of the keys of the table that contains this one.
        places: Model -> path of its table, for the tables yielded so far; this function adds to it.
    """
    schema = model.model_json_schema(by_alias=True)
    meanings: dict[str, str] = {}
    keys, inner = [], []
    for name, field in model.model_fields.items():
        key = field.alias or name
        where = f"{path}.{key}".lstrip(".")
        forms = list(_forms(where, field))
        meanings[key] = _meaning(key, field, forms, around)
        for place, inner_model, _ in forms:
            places.setdefault(inner_model, place)
        values = f"table `[{places[forms[0][1]]}]`" if forms else _values(key, schema["properties"][key], schema)
        keys.append(Key(key, values, _default(field), meanings[key]))
        inner += forms
    yield Section(path, form, _first_paragraphs(model), tuple(keys))
    for where, form_model, chosen in inner:
        if places[form_model] == where:
            yield from _walk(form_model, where, chosen, {**around, **meanings}, places)


def _forms(where: str, field: FieldInfo) -> Iterator[tuple[str, Model, str]]:
    """Yield the tables that may be a key's value: dotted path, model, and the `key = "value"` that chooses it."""
    if where == "tracking":
        yield where, TrackingConfig, ""
    for key, registry in _CHOSEN.items():
        if where == key.partition(".")[0]:
            for name in registry.built_in:
                yield where, registry.load(name), f'{key.partition(".")[2]} = "{name}"'
            return
    models = list(_models(field.annotation))
    is_named = any(typing.get_origin(part) in (dict, Mapping) for part in _parts(field.annotation))
    for model in models:
        chosen = _chooser(model) if len(models) > 1 else ""
        yield f"{where}.NAME" if is_named else where, model, chosen


def _chooser(model: Model) -> str:
    """Text `kind = "NAME"` that chooses this model among several."""
    names = typing.get_args(model.model_fields["kind"].annotation)
    return "kind = " + " or ".join(f'"{name}"' for name in names)


def _models(annotation: Any) -> Iterator[Model]:
    for part in _parts(annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield part


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield a type annotation and, recursively, its type arguments."""
    yield annotation
    if typing.get_origin(annotation) is not Literal:
        for part in typing.get_args(annotation):
            yield from _parts(part)


def _meaning(key: str, field: FieldInfo, forms: list[tuple[str, Model, str]], around: Mapping[str, str]) -> str:
    if field.description:
        return field.description
    if typing.get_origin(field.annotation) is Literal and key in ("kind", "name"):
        return "Chooses this form of the table."
    if forms and len({model for _, model, _ in forms}) == 1:
        return _first_paragraphs(forms[0][1])
    if forms:
        return "One of the forms below."
    return around.get(key, "")


def _first_paragraphs(model: Model) -> str:
    return " ".join((model.__doc__ or "").split())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    factory = cast(Callable[[], Any] | None, field.default_factory)
    value = factory() if factory else field.default
    if value is None or value == {}:
        return "left out"
    if isinstance(value, BaseModel):
        return "its defaults"
    return f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    """Write a default value as TOML."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float) and value == int(value) and abs(value) < 1e6:
        return f"{value:.1f}"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _values(key: str, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """Describe the allowed values of a key, such as `number, at least 0`, from its JSON schema."""
    if key in _NAMED and ("type" in schema or "anyOf" in schema):
        names = " ".join(f'`"{name}"`' for name in _NAMED[key].built_in)
        return f"list of {names}" if schema.get("type") == "array" else names
    if "$ref" in schema:
        return _values("", root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema or "oneOf" in schema:
        options = [part for part in schema.get("anyOf", schema.get("oneOf", [])) if part.get("type") != "null"]
        return ", or ".join(dict.fromkeys(_values(key, part, root) for part in options))
    if "enum" in schema or "const" in schema:
        return " ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return _list(schema, root)
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        return f"table of {_values('', inner, root)}" if isinstance(inner, dict) else "table"
    name = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true` `false`"}
    return f"{name[schema['type']]}{_bounds(schema)}"


def _list(schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    if parts := schema.get("prefixItems"):
        return f"{len(parts)} of: {_values('', parts[0], root)}"
    return f"list of {_values('', schema['items'], root)}"


def _bounds(schema: Mapping[str, Any]) -> str:
    """Describe the range of a number, such as `, 1 to 5`; empty without bounds of its own."""
    whole = schema["type"] == "integer"
    least, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    most, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if whole and above is not None:
        least, above = above + 1, None
    if any(abs(bound or 0) > _PLAIN for bound in (least, most, below)):
        return ""
    if least is not None and most is not None:
        return f", {_number(least)} to {_number(most)}"
    told = {"at least": least, "above": above, "at most": most, "below": below}
    words = [f"{word} {_number(bound)}" for word, bound in told.items() if bound is not None]
    return f", {' and '.join(words)}" if words else ""


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
