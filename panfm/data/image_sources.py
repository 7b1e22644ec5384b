"""Finds the images of a new site in a folder, or in a table that lists them. Only names are read, no image."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from panfm.anatomy import parse_stream
from panfm.data.image_names import SPLITS as SPLIT_NAMES
from panfm.data.image_names import NamedImage, NameRules, UnclearNameError, image_of_mask, read_name, stem
from panfm.data.manifest import SPLITS
from panfm.data.readers import ImageReader
from panfm.data.subjects import SHORTENED, is_shortened
from panfm.data.tables import read_table
from panfm.errors import DataError
from panfm.registry import READERS

_NOT_ENTERED = {"derivatives", "sourcedata", "code", "stimuli"}
"""Folders of a BIDS data set that hold no original images."""
LABEL_FILES = ("labels.csv", "labels.toml")
"""A table of labels, and its rules, as a site folder has them."""
_OWN_FILES = ("site.toml", "manifest.csv", "quarantine.csv", *LABEL_FILES)
_TABLES = (".csv", ".tsv", ".xlsx", ".xls", ".ods")
_A_TABLE = "a table; one of labels is named labels.csv and lies beside site.toml"
_COLUMNS = {
    "subject": ("subject", "participant_id", "participant", "subject_id", "patient", "patient_id"),
    "path": ("path", "file", "filename", "image", "image_path"),
    "stream": ("stream",),
    "session": ("session", "session_id", "visit"),
    "split": ("split",),
    "mask": ("mask",),
}
"""Column of the manifest -> names that a table may give it."""


@dataclass(frozen=True)
class LeftOut:
    """A file, or column of a table, that becomes no row."""

    path: str
    reason: str


@dataclass(frozen=True)
class Candidate:
    """An image, and what is known of it."""

    path: Path
    """Absolute."""
    name: NamedImage
    mask: str = ""


def images_of_folder(root: Path, rules: NameRules, site_folder: Path, left_out: list[LeftOut]) -> list[Candidate]:
    """The images below a folder, in order of their paths; files that become none are added to `left_out`."""
    images: list[Path] = []
    masks: list[tuple[Path, tuple[str, str]]] = []
    for path in _images_below(root, site_folder, left_out):
        mask = image_of_mask(PurePath(path.relative_to(root)))
        masks += [(path, mask)] if mask else []
        images += [] if mask else [path]
    mask_of = _pair(root, images, masks, left_out)
    candidates = []
    for path in images:
        relative = path.relative_to(root)
        try:
            candidates.append(Candidate(path, read_name(PurePath(relative), rules), mask_of.get(path, "")))
        except UnclearNameError as error:
            left_out.append(LeftOut(relative.as_posix(), str(error)))
    return candidates


def _images_below(root: Path, site_folder: Path, left_out: list[LeftOut]) -> Iterator[Path]:
    """Yield images in the order of their names; other files are added to `left_out`."""
    readers = _readers()
    own = {site_folder / name for name in _OWN_FILES}
    if (root / LABEL_FILES[0]).is_file():  # SourceLabels tells of them
        own |= {root / name for name in LABEL_FILES}
    for place, folders, files in os.walk(root):
        folder = Path(place)
        for name in sorted(folders):
            path = folder / name
            if _is_image(path, readers):
                yield path
            elif not (reason := _reason_to_pass(path, root)):
                continue
            else:
                left_out.append(LeftOut(f"{path.relative_to(root).as_posix()}/", reason))
            folders.remove(name)
        folders.sort()
        for name in sorted(files):
            path = folder / name
            if path in own:
                continue
            if reason := _reason_to_leave(path, readers):
                left_out.append(LeftOut(path.relative_to(root).as_posix(), reason))
            else:
                yield path


def _readers() -> list[ImageReader]:
    return [READERS.load(name)() for name in dict.fromkeys([*READERS.names, *READERS.add_installed()])]


def _reason_to_leave(path: Path, readers: Iterable[ImageReader]) -> str:
    """Why a file is no image of a site; empty if it is one."""
    if path.name.startswith("."):
        return "a hidden file"
    if not _can_be_written(path):
        return "a name that a table cannot hold"
    if not path.is_file():
        return "a link to nothing"
    if _is_image(path, readers):
        return ""
    return _A_TABLE if path.suffix.lower() in _TABLES else "no image that a reader accepts"


def _can_be_written(path: Path) -> bool:
    """Whether the path is UTF-8 text without blanks at its ends, which tables strip, or line breaks."""
    text = str(path)
    return text == text.strip() and text.isprintable() and text.encode(errors="ignore") == os.fsencode(text)


def _is_image(path: Path, readers: Iterable[ImageReader]) -> bool:
    return any(reader.accepts(path) for reader in readers)


def _reason_to_pass(folder: Path, root: Path) -> str:
    """Why a folder is not looked into; empty if it is."""
    if folder.is_symlink():
        return "a link to a folder, which is not followed"
    if folder.name.startswith("."):
        return "a hidden folder"
    is_bids = (root / "dataset_description.json").exists() and folder.parent == root
    return "a folder of BIDS without original images" if is_bids and folder.name in _NOT_ENTERED else ""


def _pair(
    root: Path, images: Sequence[Path], masks: Sequence[tuple[Path, tuple[str, str]]], left_out: list[LeftOut]
) -> dict[Path, str]:
    """Match images with their masks; a mask that belongs to no image, or to several, is added to `left_out`."""
    named_alike: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for image in images:
        folder, name = image.parent.relative_to(root).as_posix(), stem(PurePath(image))
        for key in ((folder, name), (folder, ""), ("", name)):
            named_alike[key].append(image)
    mask_of: dict[Path, str] = {}
    for path, key in masks:
        named = named_alike[key]
        if len(named) == 1 and named[0] not in mask_of:
            mask_of[named[0]] = str(path)
        else:
            reason = f"a mask by its name, of {len(named) or 'no'} images"
            left_out.append(LeftOut(path.relative_to(root).as_posix(), reason))
    return mask_of


def images_of_table(table: Path, rules: NameRules, left_out: list[LeftOut]) -> list[Candidate]:
    """The images that a table names; columns and lines that become none are added to `left_out`.

    Raises:
        DataError: it is no table, or has no columns for subject and path.
    """
    try:
        is_tsv = table.suffix.lower() == ".tsv"
        columns, lines = read_table(table, (), delimiter="\t" if is_tsv else ",")
    except DataError as error:
        raise DataError(f"{table}: {error}, expected a folder of images or a table of subject and path") from error
    plain = {one: one.lower().replace(" ", "_").replace("-", "_") for one in columns}
    column_of = {name: next((one for one in columns if plain[one] in known), "") for name, known in _COLUMNS.items()}
    for needed in ("subject", "path"):
        if not column_of[needed]:
            given, expected = ", ".join(columns) or "nothing", " or ".join(_COLUMNS[needed])
            is_one, mark = len(columns) == 1 and any(mark in given for mark in ",;|\t"), "tabs" if is_tsv else "commas"
            hint = f" (save the table with {mark} between cells)" if is_one else ""
            raise DataError(f"{table}: found columns {given}, expected one for the {needed}: {expected}{hint}")
    unused = [column for column in columns if column not in column_of.values()]
    left_out += [LeftOut(f"column {name}", "no column of a manifest; labels go into labels.csv") for name in unused]
    candidates, readers = [], _readers()
    for line, cells in lines:
        row = {name: cells[column] if column else "" for name, column in column_of.items()}
        try:
            candidates.append(_read_line(table, row, rules, readers))
        except UnclearNameError as error:
            left_out.append(LeftOut(f"{table.name}:{line}: {row['path']}", str(error)))
    return candidates


def _read_line(table: Path, row: Mapping[str, str], rules: NameRules, readers: Sequence[ImageReader]) -> Candidate:
    """An image of a table; what the table leaves open is read from the path."""
    if not row["path"] or not row["subject"]:
        raise UnclearNameError(f"no {'path' if row['subject'] else 'subject'}")
    path = table.parent.absolute() / row["path"]
    if not path.exists():
        raise UnclearNameError("no such file")
    if not _is_image(path, readers):
        raise UnclearNameError("no image that a reader accepts")
    if is_shortened(row["subject"]):
        raise UnclearNameError(f"subject {row['subject']!r}, expected {SHORTENED}")
    split = SPLIT_NAMES.get(row["split"].lower(), row["split"])
    if split and split not in SPLITS:
        raise UnclearNameError(f"split {split!r}, expected {' or '.join(SPLITS)}")
    stream = row["stream"]
    if stream:
        try:
            parse_stream(stream)
        except ValueError as error:
            raise UnclearNameError(str(error)) from error
    else:
        stream = read_name(PurePath(row["path"]), replace(rules, subject=None)).stream
    mask = str(table.parent.absolute() / row["mask"]) if row["mask"] else ""
    return Candidate(path, NamedImage(row["subject"], stream, row["session"], split), mask)
