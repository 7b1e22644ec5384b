"""Takes a table of labels that lies in a folder of images into the folder of a new site."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from panfm.data.image_sources import LABEL_FILES
from panfm.data.joins import Join
from panfm.data.labels import read_cells
from panfm.errors import DataError


@dataclass(frozen=True)
class SourceLabels:
    """Label files of a folder of images."""

    files: tuple[Path, ...] = ()
    """`labels.csv`, and `labels.toml` if it is there, to be copied to the site; none if they are left out."""
    lines: tuple[str, ...] = ()
    """Lines for people: whether the labels are taken, and whose they are."""

    @classmethod
    def find(cls, source: Path, folder: Path, subjects: Iterable[str], *, is_new: bool) -> "SourceLabels":
        """Look for label files.

        Args:
            source: Folder of images, or anything else, which has no such files.
            folder: The site's folder, which need not be there.
            subjects: Of the site's manifest.
            is_new: Whether the site has no `site.toml` yet.
        """
        table, own = source / LABEL_FILES[0], folder / LABEL_FILES[0]
        if not table.is_file() or (own.is_file() and own.read_bytes() == table.read_bytes()):
            return cls()
        if not is_new or own.exists():
            remedy = f'to use it, copy it to {own} and write labels = "{own.name}" into {folder / "site.toml"}'
            return cls(lines=(f"left out, a table of labels: {table}; {remedy}",))
        try:
            cells = read_cells(table)
        except DataError as error:
            return cls(lines=(f"left out, not a table of labels: {error}",))
        columns = ", ".join(cells.cells) or "no column"
        lines = (
            f"labels: {columns} of {table}, which is copied to {own}",
            *Join.of(subjects, cells.subjects).lines("images", "labels"),
        )
        return cls(tuple(path for path in map(source.joinpath, LABEL_FILES) if path.is_file()), lines)

    def copy_to(self, folder: Path) -> None:
        """Copy the files into the site's folder. Raises OSError."""
        for path in self.files:
            (folder / path.name).write_bytes(path.read_bytes())
