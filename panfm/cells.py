"""One rule by which two cells of a table are the same: case, zero-width characters and the spelling of numbers do not
tell them apart."""

import math
import unicodedata

_INVISIBLE = {"\u034f", "\u115f", "\u1160", "\u3164", *map(chr, range(0xFE00, 0xFE10))}
"""Characters without width that Unicode does not call format characters (Cf)."""


def visible(text: str) -> str:
    """Remove zero-width characters from a text."""
    return "".join(letter for letter in text if unicodedata.category(letter) != "Cf" and letter not in _INVISIBLE)


def plain_cell(cell: str) -> str:
    """Normalise a cell: lower case, no zero-width characters, numbers in one spelling."""
    shown = visible(cell).strip()
    number = plain_number(shown)
    return shown.casefold() if number is None else f"{number:.15g}"


def plain_number(cell: str) -> float | None:
    """The number in a cell; None if it is none, not finite, or written with `_` between digits, which Python allows."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in cell else None
