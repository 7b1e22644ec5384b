"""The account of a join by subject: who stands in both tables, who in one only, and who is spelled in two ways."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from panfm.data.subjects import subject_key

_NAMED = 5
"""Subjects of an account that are told by name."""


@dataclass(frozen=True)
class Join:
    """Which subjects of two tables are the same, and which stand in one only."""

    used: int
    """Subjects that stand in both."""
    respelled: tuple[tuple[str, str], ...]
    """Of these, pairs that are spelled differently."""
    left: tuple[str, ...]
    """Subjects of the first table that the second lacks."""
    right: tuple[str, ...]
    """Subjects of the second table that the first lacks."""

    @classmethod
    def of(cls, first: Iterable[str], second: Iterable[str]) -> "Join":
        """Join two tables, each with one spelling per subject."""
        ours, theirs = by_key(first), by_key(second)
        both = [key for key in ours if key in theirs]
        respelled = tuple((ours[key], theirs[key]) for key in both if ours[key] != theirs[key])
        left = tuple(ours[key] for key in ours if key not in theirs)
        return cls(len(both), respelled, left, tuple(theirs[key] for key in theirs if key not in ours))

    def lines(self, first: str, second: str) -> list[str]:
        """Tell the account of two named tables: what was used, then what was not, by name."""
        lines = [f"{second}: {counted(self.used, 'subject')} used for {first}"]
        if self.respelled:
            pairs = named(f"{theirs!r} for {ours!r}" for ours, theirs in self.respelled)
            lines.append(f"{second}: spelled otherwise than in {first}: {pairs}")
        lines += [
            f"{here}: {counted(len(names), 'subject')} not in {there}: {named(map(repr, names))}"
            for here, there, names in ((first, second, self.left), (second, first, self.right))
            if names
        ]
        return lines


def by_key(subjects: Iterable[str]) -> Mapping[str, str]:
    """Key -> first spelling, in order."""
    spelled: dict[str, str] = {}
    for subject in subjects:
        spelled.setdefault(subject_key(subject), subject)
    return spelled


def counted(number: int, noun: str) -> str:
    """Write a number with its noun: `1 subject`, `2 subjects`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def named(texts: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    names = list(texts)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
