"""Faults of a description, one line each: the dotted key, what was found and what was expected.

For an unknown key the line names the nearest known one.
"""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from panfm.config.base import UnknownNameError
from panfm.errors import one_line
from panfm.texts import toml_key

_MAX_COMPLAINTS = 20
_MAX_KEY = 64
"""Characters of an unknown key that are compared to the known ones."""
_MAX_FOUND = 80
_RENAMED = {"privacy": "patient-dp", "server-privacy": "site-dp"}
"""Keys of earlier versions."""
_REPLACED = dict.fromkeys(
    ("limits.experiments", "limits.starts"),
    "is no longer a key; remove the line, and approve each experiment with its start: panfm site approve SITE HASH",
)
"""Key of earlier versions -> what takes its place."""
_WANTED = {"streams": "a table for each stream, as `panfm plan SITE ... --out run.toml` writes them"}
"""Missing key -> its value, where that is not plain."""
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_type": "a whole number",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "list_type": "a list",
    "model_type": "a table",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} characters",
    "string_type": "text",
    "string_unicode": "Unicode text",
    "too_long": "at most {max_length} entries",
    "too_short": "at least {min_length} entries",
    "tuple_type": "a list",
}
"""Pydantic's type of a fault -> what was expected, with the numbers of the fault."""


def complaints(kind: type[BaseModel], error: ValidationError, table: Any) -> list[str]:
    """The faults of a description that was read as `kind`, one line each, and how many more there are.

    Args:
        table: The description as TOML has it.
    """
    faults = error.errors(include_url=False)
    lines = [one_line(_complaint(kind, fault, table), limit=1000) for fault in faults[:_MAX_COMPLAINTS]]
    more = len(faults) - len(lines)
    return [*lines, f"{more} more faults"] if more else lines


def _complaint(kind: type[BaseModel], fault: Any, table: Any) -> str:
    context = fault.get("ctx", {})
    if isinstance(cause := context.get("error"), UnknownNameError):
        return _unknown_name(toml_key(*map(str, fault["loc"])), cause)
    keys, around, here = _locate(kind, fault["loc"], table)
    key = toml_key(*keys)
    match fault["type"]:
        case "missing":
            return f"{key}: missing, expected {_WANTED.get(key, 'a value')}"
        case "extra_forbidden" if keys[0] == "streams" and isinstance(fault["input"], dict):
            quoted = toml_key("streams", ".".join(keys[1:]))
            return f"{'.'.join(keys)}: a table in a stream, expected [{quoted}], in quotes"
        case "extra_forbidden" if key in _REPLACED:
            return f"{key}: {_REPLACED[key]}"
        case "extra_forbidden":
            return f"{key}: unknown key, {_known_keys(keys, around)}"
        case "union_tag_invalid" | "union_tag_not_found":
            tag = context["discriminator"].strip("'")
            given = _shown(context["tag"]) if "tag" in context else "nothing"
            return f"{key}.{tag}: found {given}, expected one of {', '.join(_tags(here, tag))}"
        case "literal_error" | "enum":
            return f"{key}: found {_shown(fault['input'])}, expected one of {_choices(context['expected'])}"
        case known if known in _EXPECTED:
            return f"{key}: found {_shown(fault['input'])}, expected {_EXPECTED[known].format(**context)}"
    message = fault["msg"].removeprefix("Value error, ")
    is_whole_table = fault["type"] == "value_error" and isinstance(fault["input"], dict)
    given = "" if is_whole_table else f" (found {_shown(fault['input'])})"
    return f"{key}: {message}{given}" if key else message


def _unknown_name(key: str, cause: UnknownNameError) -> str:
    """The fault under the key where it is, such as `sharing.groups.head.mean`, if that chooses the same thing."""
    usual_key, _, reason = str(cause).partition(": ")
    return f"{key}: {reason}" if key.rpartition(".")[2] == usual_key.rpartition(".")[2] else str(cause)


def _shown(value: object) -> str:
    """A value of a description, cut short."""
    if isinstance(value, Mapping):
        return "a table"
    return str(value).lower() if isinstance(value, bool) else f"{value!r:.{_MAX_FOUND}}"


def _choices(expected: str) -> str:
    """`'a', 'b' or 'c'` -> `a, b, c`."""
    return expected.replace(" or ", ", ").replace("'", "")


def _known_keys(keys: list[str], around: list[Any]) -> str:
    """The known key that is nearest to an unknown one, or all that are known."""
    known = sorted({name for member in around for name in _fields(member)})
    key = _RENAMED.get(keys[-1], keys[-1][:_MAX_KEY])
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    return f"did you mean {toml_key(*keys[:-1], near[0])}?" if near else f"known: {', '.join(known)}"


def _locate(kind: type[BaseModel], location: Iterable[object], table: Any) -> tuple[list[str], list[Any], list[Any]]:
    """The keys as TOML has them, and the models and dicts around and at the last one.

    Pydantic's location also names the chosen member of a union, and `[key]` where a key itself is at fault.
    """
    keys: list[str] = []
    around: list[Any] = []
    here: list[Any] = [kind]
    for part in map(str, location):
        below = [inner for member in here for inner in _descend(member, part)]
        if not below and len(here) > 1:
            here = [member for member in here if part in _literals(member)]
        elif part != "[key]":
            keys.append(part)
            table = table.get(part) if isinstance(table, Mapping) else None
            around, here = here, [_chosen(member, table) for inner in below for member in _members(inner)]
    return keys, around, here


def _chosen(member: Any, table: Any) -> Any:
    """The class that reads a table: the one that its name chooses, where a model is the base of plug-ins."""
    return member.chosen(table) if hasattr(member, "chosen") else member


def _tags(union: list[Any], tag: str) -> list[str]:
    """Values that choose a member of a union."""
    return [value for member in union for value in typing.get_args(_fields(member).get(tag))]


def _literals(model: Any) -> list[str]:
    values = [typing.get_args(annotation) for annotation in _fields(model).values()]
    return [value for group in values for value in group if isinstance(value, str)]


def _descend(member: Any, step: str) -> list[Any]:
    """Types of the values under one key: of the field of that name, or of a table with free keys."""
    if typing.get_origin(member) is dict:
        return [typing.get_args(member)[1]]
    fields = _fields(member)
    return [fields[step]] if step in fields else []


def _members(annotation: Any) -> list[Any]:
    """Models and dicts inside unions and annotations."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation] if is_model or origin is dict else []


def _fields(model: Any) -> dict[str, Any]:
    fields = getattr(model, "model_fields", {})
    return {field.alias or name: field.annotation for name, field in fields.items()}
