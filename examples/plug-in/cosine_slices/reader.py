"""Volumes as folders of text files, one slice each: `<name>.slices/0.txt`, `1.txt`, ... with voxels of 2 mm."""

from pathlib import Path

import numpy as np

from panfm.data.readers import ImageError, Volume, file_at_fault, file_fingerprint


class SlicesReader:
    """Reads one volume from a folder; the slices stand from the feet to the head, in the order of their names."""

    kind = "a folder of text slices (.slices)"

    def accepts(self, path: Path) -> bool:
        """Whether the name is that of a folder of slices."""
        return path.suffix == ".slices"

    def fingerprint(self, path: Path) -> str:
        """Path, size and time of change of every slice."""
        return "\n".join(file_fingerprint(file) for file in sorted(path.iterdir()))

    def read(self, path: Path) -> Volume:
        """Stack the slices. Raises ImageError: there is none, or one is no table of numbers."""
        with file_at_fault("no readable slices", "text files of numbers, of one size"):
            slices = [np.loadtxt(file, dtype=np.float32, ndmin=2) for file in sorted(path.iterdir())]
            if not slices:
                raise ImageError("a folder without slices", "at least one")
            return Volume(np.stack(slices, axis=-1), np.diag([2.0, 2.0, 2.0, 1.0]))
