"""TOML and JSON that somebody else wrote, checked before they are parsed.

A parser's time and memory may grow with the square of a text, or worse: a dotted key of 39 KiB keeps `tomllib` busy for
17 s and 1.5 GiB. So a text has a largest size and a largest nesting, and both are checked in one pass over it.
"""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from panfm.errors import ConfigError, one_line

MAX_BYTES = 1 << 16
"""Size of a description."""
MAX_DEPTH = 16
"""Levels of tables, arrays and parts of dotted keys around one value; descriptions have five."""
PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""Name of a site, or id of a run, that may name a folder."""
_BROKEN_ESCAPE = re.compile(r"Invalid hex value|Unescaped '")
"""Errors of the parser about a path with backslashes in double quotes."""
_TOKEN = re.compile(
    r"""
      \"{3} (?: [^"\\] | \\. | "(?!"") )*+ (?: "{3,5}+ )?
    | '{3} (?: [^'] | '(?!'') )*+ (?: '{3,5}+ )?
    | " (?: [^"\\\n] | \\[^\n] )*+ "?
    | ' [^'\n]*+ '?
    | \# [^\n]*+
    | [\[\]{},.\n]
    """,
    re.VERBOSE | re.DOTALL,
)
"""Strings and comments as a whole, so that what they hold does not count; brackets, dots, and ends of a value. A string
that does not end is one token as well: every character is read once."""


def toml_key(*names: str) -> str:
    """A dotted key as TOML writes it; a name with a dot stands in quotes: `streams."brain-mr.t1".shape`."""
    return ".".join(f'"{name}"' if "." in name else name for name in names)


def parse_toml(text: str, where: str, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Parse a TOML text. Raises ConfigError, beginning with `where`: too large, too deep, or not TOML."""
    check_text(text, where, max_bytes=max_bytes)
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers too long
        hint = " (write / in paths, or single quotes)" if _BROKEN_ESCAPE.match(str(error)) else ""
        raise ConfigError(f"{where}: not valid TOML: {one_line(str(error))}{hint}") from error
    if _has_long_integer(table):
        raise ConfigError(f"{where}: an integer of more than 64 bits, which TOML does not have")
    return table


def parse_json(text: str, where: str, *, max_bytes: int = MAX_BYTES) -> Any:
    """Parse a JSON text. Raises ConfigError, beginning with `where`: too large, too deep, or not JSON."""
    check_text(text, where, max_bytes=max_bytes)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON: {one_line(str(error))}") from error


def read_text(path: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """Text of a file, of which no more than `max_bytes` and one are read: `check_text` then refuses it.

    Raises:
        OSError, UnicodeDecodeError: as from `Path.read_text`.
    """
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    return content.decode(errors="strict" if len(content) <= max_bytes else "replace")


def check_text(text: str, where: str, *, max_bytes: int = MAX_BYTES) -> None:
    """Raises ConfigError, beginning with `where`, if a TOML or JSON text is too large or too deep to be parsed.

    Guarantees:
        linear: time and memory grow with the text's length, whatever it holds.
    """
    if len(text) > max_bytes or len(text.encode(errors="surrogatepass")) > max_bytes:
        raise ConfigError(f"{where}: more than {max_bytes} bytes of text, expected at most as many")
    if _is_too_deep(text):
        raise ConfigError(f"{where}: nested deeper than {MAX_DEPTH} levels of tables, arrays and dotted keys")


def _is_too_deep(text: str) -> bool:
    """Whether a value stands under too many brackets and parts of keys. A dot counts until its value ends."""
    depth = 0
    opened: list[int] = []
    """Depth outside each open bracket."""
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in ("[", "{"):
            opened.append(depth)
            depth += 1
        elif token in ("]", "}"):
            depth = opened.pop() if opened else 0
        elif token in (",", "\n"):
            depth = opened[-1] + 1 if opened else 0
        elif token == ".":
            depth += 1
        if depth > MAX_DEPTH:
            return True
    return False


def _has_long_integer(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_long_integer, value.values()))
    if isinstance(value, list):
        return any(map(_has_long_integer, value))
    return isinstance(value, int) and not -(2**63) <= value < 2**63
