"""Proposes the manifest of a site from the file names of a folder of images, or from a table that lists them.

A proposal never changes or drops a row that the manifest has. New rows take the split of their subject where it has
one, else that of their folder (`train/`, `val/`, `test/`), else one drawn from the subject's name alone: the same
whenever it is drawn, so that subjects who are added later move nobody.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from panfm.anatomy import parse_stream
from panfm.config import SiteConfig
from panfm.data.image_names import NameRules, stem
from panfm.data.image_sources import Candidate, LeftOut, images_of_folder, images_of_table
from panfm.data.manifest import Row, image_path
from panfm.data.subjects import subject_key
from panfm.seeds import derive_seed

VAL_SHARE, TEST_SHARE = 0.1, 0.1
"""Of the subjects, on average."""
_SEVERAL = range(2, 10)
"""Images of one patient, where names such as P1_a and P1_b may be two images of patient P1."""
_MOST_NAMED = 3
_IMAGE_OF_PATIENT = re.compile(r"(.*\d.*)[-_. ][^-_. ]+|(.*\d)[A-Za-z]")
"""A name that ends with more than a patient: a word of its own, or a letter behind a number."""


@dataclass(frozen=True)
class Proposal:
    """Rows of a manifest, before they are written."""

    kept: tuple[Row, ...]
    """Rows that the manifest has already."""
    added: tuple[Row, ...]
    """New rows; their line numbers mean nothing."""
    left_out: tuple[LeftOut, ...]
    unclear: tuple[str, ...]
    """One line for each thing that must be told apart before anything is written."""
    notes: tuple[str, ...] = ()
    """One line for each thing that a person should look at."""


def propose(
    source: Path,
    rules: NameRules,
    site_folder: Path,
    site: SiteConfig,
    kept: Sequence[Row] = (),
    *,
    split: str = "",
) -> Proposal:
    """Propose rows for the images of a folder or table.

    Args:
        source: Folder of images, or table of subjects and paths (.csv, .tsv).
        rules: What the user says of names.
        site_folder: The folder of the site, whose own files are no images.
        kept: Rows that its manifest has.
        split: Of all new subjects; drawn for each of them when empty.
    Raises:
        DataError: the source cannot be read, or the table has no columns of subject and path.
        ValueError: a pattern names no stream.
    """
    for stream in rules.patterns.values():
        parse_stream(stream)
    left_out: list[LeftOut] = []
    source, site_folder = (Path(os.path.realpath(path)) for path in (source, site_folder))
    if source.is_dir():
        candidates = images_of_folder(source, rules, site_folder, left_out)
    else:
        candidates = images_of_table(source, rules, left_out)
    known = {os.path.realpath(image_path(site_folder, site, row.path)) for row in kept if "\0" not in row.path}
    by_path: dict[str, Candidate] = {}
    for one in candidates:
        if (path := os.path.realpath(one.path)) in known:
            continue
        if (first := by_path.setdefault(path, one)) is not one:
            left_out.append(LeftOut(str(one.path), f"the file of subject {first.name.subject!r} again"))
    new = list(by_path.values())
    if split:
        new = [replace(one, name=replace(one.name, split=split)) for one in new]
    unclear = [*_respelled(new, kept), *_repeated(new), *_torn(new, kept)]
    taken = {(row.subject, row.session, row.stream): row.line for row in kept}
    rows = []
    for row in _rows(new, kept, image_path(site_folder, site, ".")):
        if line := taken.get((row.subject, row.session, row.stream)):
            reason = f"line {line} of the manifest has another image of {row.subject} and {row.stream}"
            left_out.append(LeftOut(row.path, reason))
        else:
            rows.append(row)
    names_are_read = source.is_dir() and rules.subject is None
    notes = several_images({row.subject: row.path for row in (*kept, *rows)}) if names_are_read else []
    return Proposal(tuple(kept), tuple(rows), tuple(left_out), tuple(unclear), tuple(notes))


def draw_split(subject: str) -> str:
    """Split of a subject, from its name alone: one in ten val, one in ten test, the rest train."""
    place = derive_seed(0, "split", subject) / 2**63
    return "val" if place < VAL_SHARE else "test" if place < VAL_SHARE + TEST_SHARE else "train"


def _repeated(candidates: Sequence[Candidate]) -> Iterator[str]:
    """A line for each subject with several images of one stream and session, and what tells them apart."""
    together: dict[tuple[str, str, str], list[PurePath]] = defaultdict(list)
    for one in candidates:
        together[one.name.subject, one.name.session, one.name.stream].append(PurePath(one.path))
    for (subject, session, stream), paths in together.items():
        if len(paths) > 1:
            names = ", ".join(path.name if len({p.name for p in paths}) > 1 else path.as_posix() for path in paths)
            visit = f", {session}," if session else ""
            yield f"subject {subject!r}{visit} has {len(paths)} images of {stream}: {names}; {_remedy(stream, paths)}"


def _remedy(stream: str, paths: Sequence[PurePath]) -> str:
    """What to write so that the images of a subject become streams, or subjects, of their own."""
    words = [stem(path).split("_") for path in paths]
    own = [min(set(mine).difference(*(other for other in words if other is not mine)), default="") for mine in words]
    plain = stream.partition(".")[0]
    if all(own):
        several = " ".join(
            f"--stream {plain}.{_slug(word)}='{_pattern(mine, word)}'" for mine, word in zip(words, own, strict=True)
        )
        return f"write {several} if they are different images, or --subject 'EXPRESSION' if they are different patients"
    return "write --subject 'EXPRESSION' that finds the patient in the path, or a table with subject, stream and path"


def _pattern(words: Sequence[str], word: str) -> str:
    """A pattern of file names without ending that have a word where this name has it: first, last or between."""
    place = words.index(word)
    return f"{'*_' if place else ''}{word}{'_*' if place < len(words) - 1 else ''}"


def several_images(paths: Mapping[str, str]) -> list[str]:
    """One line if subjects look like several images of one patient, such as P1_a and P1_b; else none.

    Names with a number at the end, such as study7_001 and study7_002, look so only if there are several of study7.

    Args:
        paths: Subject -> path of one of its images.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for subject in paths:
        if match := _IMAGE_OF_PATIENT.fullmatch(subject):
            groups[match[1] or match[2]].append(subject)
    alike = {patient: names for patient, names in groups.items() if len(names) in _SEVERAL}
    if not alike or (len(groups) == 1 and all(name[-1].isdigit() for name in next(iter(alike.values())))):
        return []
    shown = "; ".join(f"{', '.join(names)} of {patient}" for patient, names in list(alike.items())[:_MOST_NAMED])
    more = f" and {len(alike) - _MOST_NAMED} more" if len(alike) > _MOST_NAMED else ""
    expression = _expression({patient: [paths[name] for name in names] for patient, names in alike.items()})
    told = f"these look like several images of one patient: {shown}{more}; each is taken for a patient of its own"
    return [f"{told}. If they are one patient's, write --subject '{expression}'"]


def _expression(paths: Mapping[str, Sequence[str]]) -> str:
    """Write a regular expression that finds the patients in the paths of their images; the word EXPRESSION if there is
    none for all."""
    forms = {re.sub(r"\d+", r"\\d+", re.escape(patient)) for patient in paths}
    if len(forms) > 1:
        return "EXPRESSION"
    expression = re.compile(f"({forms.pop()})[^/]*$")
    matches = [(patient, expression.search(path)) for patient, own in paths.items() for path in own]
    is_right = all(match and match[1] == patient for patient, match in matches)
    return expression.pattern if is_right else "EXPRESSION"


def _respelled(candidates: Sequence[Candidate], kept: Sequence[Row]) -> Iterator[str]:
    """Yield a line for each subject that is spelled in two ways."""
    spelled: dict[str, str] = {}
    for subject in [row.subject for row in kept] + [one.name.subject for one in candidates]:
        first = spelled.setdefault(subject_key(subject), subject)
        if first != subject:
            remedy = "write one spelling in a table, or --subject 'EXPRESSION' if they are different patients"
            yield f"subjects {first!r} and {subject!r} differ in case, zeros or form only; {remedy}"


def _slug(word: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in word.lower()).split())


def _torn(candidates: Sequence[Candidate], kept: Sequence[Row]) -> Iterator[str]:
    """A line for each subject whose images lie in folders, or stand on lines, of different splits."""
    splits: dict[str, set[str]] = defaultdict(set)
    known = [(row.subject, row.split) for row in kept] + [(one.name.subject, one.name.split) for one in candidates]
    for subject, split in known:
        if split:
            splits[subject].add(split)
    for subject, several in splits.items():
        if len(several) > 1:
            remedy = "if these are different patients, write --subject 'EXPRESSION' that tells them apart"
            yield f"subject {subject!r} is in split {' and '.join(sorted(several))}, expected one; {remedy}"


def _rows(candidates: Sequence[Candidate], kept: Sequence[Row], base: Path) -> Iterator[Row]:
    """Rows in the order of subject, session and stream; paths are relative where they lie below the manifest."""
    splits = {row.subject: row.split for row in kept}
    for candidate in candidates:
        if candidate.name.split:
            splits.setdefault(candidate.name.subject, candidate.name.split)
    for one in sorted(candidates, key=lambda one: (one.name.subject, one.name.session, one.name.stream, str(one.path))):
        name = one.name
        split = splits.get(name.subject) or draw_split(name.subject)
        mask = _written(Path(one.mask), base) if one.mask else ""
        yield Row(0, name.subject, name.stream, _written(one.path, base), split, mask, name.session)


def _written(path: Path, base: Path) -> str:
    """A path as the manifest holds it: relative if it lies below the manifest's folder, else absolute."""
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()
