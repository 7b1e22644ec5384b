"""Kinds of labels, inferred from their values over all places: yes or no, classes, or a number.

A file `labels.toml` beside a label table overrules, one table for each column:

    [age]
    unknown = ["-999"]          # cells that mean "not known", besides empty ones
    [sex]
    yes = "f"                   # of two words, the one that is 1
    [grade]
    kind = "classes"            # yes-no, classes, number or ignore

What cannot be told is a question: the column is left out until `labels.toml` answers it.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from panfm.cells import plain_cell, plain_number
from panfm.config import parse_table
from panfm.config.base import Config
from panfm.data.joins import counted
from panfm.data.labels import Labels, LabelTable
from panfm.errors import ConfigError, DataError, one_line
from panfm.texts import parse_toml, read_text

RULES = "labels.toml"
UNKNOWN = frozenset(("", "na", "n/a", "#n/a", "nan", "null", "unknown", "?"))
"""Cells, in lower case, that mean "not known" everywhere."""
_CODES = frozenset(
    sign * value for sign in (-1.0, 1.0) for value in (8, 9, 88, 98, 99, 888, 998, 999, 8888, 9998, 9999, 99999)
) | {-1.0, -2.0, -7.0, -32768.0}
"""Numbers that tables have in the place of "not known"."""
_FAR = 3.0
"""A code is this many times as large as any other value."""
_TWO_SIDES: tuple[set[float], ...] = ({0.0, 1.0}, {1.0, 2.0}, {-1.0, 1.0})
_MOST_CLASSES = 20
_MOST_LISTED = 6
_GRADES = frozenset(map(float, range(10)))
"""Few of these may be numbers or names."""
_FEW_NUMBERS = 5
_DATES = (20_000.0, 60_000.0)
"""Range of numbers by which spreadsheets write dates of 1954 to 2064: days since 1900."""
_FAILED = frozenset(("#value!", "#ref!", "#div/0!", "#name?", "#null!", "#num!", "#spill!", "#calc!"))
"""Cells, in lower case, that a spreadsheet writes for formulas that failed."""
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:[.,' _]?\d{3})*(?:[.,]\d+)?")
"""A number with a decimal comma, or with separators between thousands."""
_DATE = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4}")
_WITH_UNIT = re.compile(r"[+-]?\d+(?:[.,]\d+)?\s*(?:%|k?g|mg|m?l|[cm]?m|mmhg|bpm|y|yrs?|years?|months?|days?)")
_YES = frozenset(("yes", "y", "true", "t", "positive", "pos", "present", "case", "1"))

Kind = Literal["yes-no", "classes", "number", "ignore"]


class LabelRule(Config):
    """A column of `labels.toml`."""

    kind: Kind | None = None
    """How the column is read; inferred from its values when left out."""
    unknown: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Cells that mean "not known"; an empty list says that no number of the column is a code."""
    yes: str | None = None
    """Of two values, the one that is 1."""


@dataclass(frozen=True)
class LabelKind:
    """How the cells of a column are read."""

    kind: Kind
    values: tuple[str, ...] = ()
    """In lower case: of yes-no first the no, then the yes; of classes all of them."""
    unknown: frozenset[str] = UNKNOWN
    """Cells, in lower case, that mean "not known"."""


@dataclass(frozen=True)
class LabelKinds:
    """Kinds of all columns, and what a person should know or answer."""

    by_column: Mapping[str, LabelKind]
    notes: tuple[str, ...]
    """One line for each column that was not plain."""


def read_rules(tables: Iterable[LabelTable]) -> dict[str, LabelRule]:
    """The rules of all `labels.toml` beside some tables, by column.

    Raises:
        ConfigError: a file does not hold, or two have different rules for a column.
    """
    rules: dict[str, LabelRule] = {}
    for path in dict.fromkeys(table.path.with_name(RULES) for table in tables):
        for name, rule in _read_rules(path).items():
            if rules.setdefault(name, rule) != rule:
                raise ConfigError(f"{path}: {name}: differs from another place's {RULES}, expected the same everywhere")
    return rules


def infer_kinds(tables: Sequence[LabelTable], rules: Mapping[str, LabelRule]) -> LabelKinds:
    """Kinds of all columns, from the values of all places together.

    Raises:
        ConfigError: a rule does not go with the values, or names a column that no table has.
    """
    columns = dict.fromkeys(name for table in tables for name in table.cells)
    if unknown := [name for name in rules if name not in columns]:
        raise ConfigError(f"{RULES}: {unknown[0]}: no label table has this column, known: {', '.join(columns)}")
    kinds, notes = {}, []
    for name in columns:
        cells = [plain_cell(cell) for table in tables for cell in table.cells.get(name, ())]
        kinds[name], note = _infer(cells, rules.get(name, LabelRule()), name)
        notes += [one_line(f"{name}: {note}")] if note else []
    return LabelKinds(kinds, tuple(notes))


def encode(table: LabelTable, kinds: Mapping[str, LabelKind]) -> Labels:
    """A table as numbers: 0 and 1 for yes-no, a column `<name>=<class>` of 0 and 1 for each class, numbers as they are.

    Raises:
        DataError: a cell is none of its column's values.
    """
    columns: dict[str, NDArray[np.float64]] = {}
    for name, kind in kinds.items():
        cells = [plain_cell(cell) for cell in table.cells.get(name, ("",) * len(table.subjects))]
        _check_cells(table, name, kind)
        if kind.kind == "number":
            columns[name] = np.array([np.nan if cell in kind.unknown else float(cell) for cell in cells])
        elif kind.kind != "ignore":
            chosen = {name: kind.values[1]} if kind.kind == "yes-no" else {f"{name}={one}": one for one in kind.values}
            for label, value in chosen.items():
                columns[label] = np.array([np.nan if cell in kind.unknown else float(cell == value) for cell in cells])
    values = np.array(list(columns.values())).reshape(len(columns), len(table.subjects)).T
    return Labels(table.subjects, tuple(columns), values)


def _check_cells(table: LabelTable, name: str, kind: LabelKind) -> None:
    for line, cell in zip(table.lines, table.cells.get(name, ()), strict=False):
        plain = plain_cell(cell)
        is_sound = plain_number(plain) is not None if kind.kind == "number" else plain in kind.values
        if kind.kind != "ignore" and plain not in kind.unknown and not is_sound:
            wanted = "a number" if kind.kind == "number" else _listed(kind.values)
            raise DataError(f"{table.path}:{line}: {name}: found {cell!r:.60}, expected {wanted} or nothing")


def _read_rules(path: Path) -> dict[str, LabelRule]:
    if not path.exists():
        return {}
    try:
        tables = parse_toml(read_text(path), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({type(error).__name__}), expected a TOML file") from error
    return {name: parse_table(LabelRule, table, str(path), key=name) for name, table in tables.items()}


def _infer(cells: Sequence[str], rule: LabelRule, name: str) -> tuple[LabelKind, str]:
    """The kind of a column, and a note on it; an empty one where it is plain.

    Args:
        cells: In lower case, of all places.
    """
    unknown = UNKNOWN | frozenset(map(plain_cell, rule.unknown or ()))
    counts = Counter(cell for cell in cells if cell not in unknown)
    numbers = {cell: number for cell in counts if (number := plain_number(cell)) is not None}
    if rule.kind == "ignore":
        return LabelKind("ignore"), ""
    if len(counts) < 2:
        same = f"all subjects have {next(iter(counts))!r:.40}" if counts else "no subject has a value"
        return LabelKind("ignore"), f"{same}, left out"
    if broken := [cell for cell in counts if cell in _FAILED or cell.startswith("=")]:
        told = counted(sum(counts[cell] for cell in broken), "formula")
        why = f"{told} of a spreadsheet, e.g. {broken[0]!r:.40}"
        remedy = f"save their values, or write in {RULES}: [{name}] unknown = [{broken[0]!r:.40}]"
        return LabelKind("ignore"), f"{why}; left out: {remedy}"
    marked = [cell for cell in counts if cell not in numbers and _GROUPED.fullmatch(cell)]
    if rule.kind is None and marked and len(marked) + len(numbers) == len(counts):
        why = f"{counted(sum(counts[cell] for cell in marked), 'number')} with commas or other marks"
        remedy = "left out: write them with a point and no other mark, as 1234.5"
        return LabelKind("ignore"), f"{why}, e.g. {marked[0]!r:.40}; {remedy}"
    if rule.kind is None and (told := _written_otherwise(counts)):
        return LabelKind("ignore"), told
    if rule.kind == "classes" or (rule.kind is None and not numbers and len(counts) > 2):
        return _classes(counts, unknown, asked=rule.kind is not None)
    if rule.kind == "yes-no" or (rule.kind is None and len(counts) == 2 and _are_two_sides(numbers)):
        return _yes_no(counts, numbers, unknown, rule, name)
    if len(numbers) < len(counts):
        odd = next(cell for cell in counts if cell not in numbers)
        told = counted(sum(counts[cell] for cell in counts if cell not in numbers), "cell")
        why = f"{told} without a number, e.g. {odd!r:.40}"
        return LabelKind("ignore"), f"{why}; left out until {RULES} says: [{name}] unknown = [{odd!r:.40}]"
    if rule.unknown != () and (codes := _codes(numbers)):
        rest = [number for cell, number in numbers.items() if cell not in codes]
        told = counted(sum(counts[code] for code in codes), "subject")
        why = f"{told} with {', '.join(codes)}, far from the others ({min(rest):g} to {max(rest):g}): not known?"
        listed = ", ".join(f'"{code}"' for code in (*(rule.unknown or ()), *codes))
        remedy = f"{RULES} says: [{name}] unknown = [{listed}], or unknown = []"
        return LabelKind("ignore"), f"{why} left out until {remedy}"
    few = rule.kind is None and len(numbers) <= _FEW_NUMBERS and {*numbers.values()} <= _GRADES
    note = f'{_listed(numbers)}: read as a number; if they are names, {RULES}: [{name}] kind = "classes"' if few else ""
    if all(number.is_integer() and _DATES[0] < number < _DATES[1] for number in numbers.values()):
        note = f"whole numbers of {min(numbers.values()):.0f} to {max(numbers.values()):.0f}: dates of a spreadsheet?"
    return LabelKind("number", unknown=unknown), note


def _written_otherwise(counts: Mapping[str, int]) -> str:
    """Tell that all cells are dates, that some are numbers with a unit, or that words and numbers are mixed as two
    codings of one label are; empty otherwise."""
    if all(_DATE.fullmatch(cell) for cell in counts):
        return f"dates, e.g. {next(iter(counts))!r:.40}; left out: write a number, such as an age"
    words = [cell for cell in counts if plain_number(cell) is None]
    if words and all(_WITH_UNIT.fullmatch(cell) for cell in words):
        return f"numbers with a unit, e.g. {words[0]!r:.40}; left out: write the numbers alone"
    if 2 <= len(words) < len(counts) <= _FEW_NUMBERS:
        return f"words and numbers ({_listed(sorted(counts))}); left out: write one coding at all places"
    return ""


def _are_two_sides(numbers: Mapping[str, float]) -> bool:
    """Whether two values are a yes and a no: two texts, or numbers as tables code them."""
    return not numbers or (len(numbers) == 2 and {*numbers.values()} in _TWO_SIDES)


def _yes_no(
    counts: Mapping[str, int], numbers: Mapping[str, float], unknown: frozenset[str], rule: LabelRule, name: str
) -> tuple[LabelKind, str]:
    if len(counts) > 2:
        fault = one_line(f"found {len(counts)} values ({_listed(counts)}), expected two")
        raise ConfigError(f'{RULES}: {name}: {fault}; write kind = "classes"')
    yes = None if rule.yes is None else plain_cell(rule.yes)
    if yes is not None and yes not in counts:
        raise ConfigError(
            one_line(f"{RULES}: {name}: yes = {rule.yes!r}: no subject has it, expected {_listed(counts)}")
        )
    ordered = sorted(counts, key=lambda cell: (numbers.get(cell, 0.0), cell in _YES, cell))
    no, one = ordered if yes is None else sorted(counts, key=lambda cell: cell == yes)
    plain = yes is not None or one in _YES or (numbers.get(no), numbers.get(one)) == (0.0, 1.0)
    note = "" if plain else f'{no} is read as 0, {one} as 1; the other way round, {RULES}: [{name}] yes = "{no}"'
    return LabelKind("yes-no", (no, one), unknown), note


def _classes(counts: Mapping[str, int], unknown: frozenset[str], *, asked: bool) -> tuple[LabelKind, str]:
    if not asked and (len(counts) > _MOST_CLASSES or 2 * len(counts) > sum(counts.values())):
        return LabelKind("ignore"), f"{len(counts)} different texts, left out"
    values = tuple(sorted(counts))
    return LabelKind("classes", values, unknown), f"classes {_listed(values)}, each probed against the others"


def _codes(numbers: Mapping[str, float]) -> list[str]:
    """The cells whose numbers stand apart as codes for "not known" do, but never all cells."""
    codes: list[str] = []
    if {*numbers.values()} == {-1.0, 1.0}:
        return codes
    for cell, number in numbers.items():
        if number not in _CODES:
            continue
        others = [other for other in numbers.values() if other != number]
        rest = [other for other in others if other not in _CODES] or others
        largest = max(map(abs, rest), default=math.inf)
        if (number < 0 and rest and min(rest) >= 0) or largest <= abs(number) / _FAR:
            codes.append(cell)
    return codes if len(codes) < len(numbers) else codes[:1]


def _listed(values: Iterable[str]) -> str:
    values = list(values)
    return ", ".join(values[:_MOST_LISTED]) + (", ..." if len(values) > _MOST_LISTED else "")
