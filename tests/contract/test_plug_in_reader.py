"""A reader for a format of one's own, one folder per image, costs its file and a line of the registry."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import copy_packages

READER = '''
"""Slices of text, one file each: the folder `<name>.slices` is a volume."""

from pathlib import Path

import numpy as np

from panfm.data.readers import ImageError, Volume, file_fingerprint


class SlicesReader:
    """Reads one volume from a folder."""

    kind = "a folder of slices (.slices)"

    def accepts(self, path: Path) -> bool:
        """By name."""
        return path.suffix == ".slices"

    def fingerprint(self, path: Path) -> str:
        """Fingerprints of all slices."""
        return "\\n".join(file_fingerprint(file) for file in sorted(path.iterdir()))

    def read(self, path: Path) -> Volume:
        """Stack the slices."""
        slices = [np.loadtxt(file, dtype=np.float32, ndmin=2) for file in sorted(path.iterdir())]
        if not slices:
            raise ImageError("a folder without slices", "at least one")
        return Volume(np.stack(slices, axis=-1), np.diag([2.0, 2.0, 2.0, 1.0]))
'''
PROGRAM = """
from pathlib import Path
import numpy as np
from panfm.config import StreamConfig
from panfm.data.cache import open_store
from panfm.data.check import check_site
from panfm.data.template import init_site

folder = Path("clinic")
init_site(folder, "clinic")
rows, weights = ["subject,stream,path"], 1.0 - np.arange(64.0).reshape(8, 8) / 100.0  # extremes at the corner
for subject in ("a", "b", "twin", "empty"):
    series = folder / f"{subject}.slices"
    series.mkdir()
    for number in range(8 if subject != "empty" else 0):
        np.savetxt(series / f"{number}.txt", 3.5 + (number + (subject == "b") - 3.5) * weights)
    rows.append(f"{subject},brain-mr,{series.name}")
(folder / "manifest.csv").write_text("\\n".join(rows) + "\\n")
streams = {"brain-mr": StreamConfig(shape=(8, 8, 8), patch=(4, 4, 4), spacing_mm=(2.0, 2.0, 2.0))}
print(*check_site(folder, streams).faults, sep="\\n")
(folder / "manifest.csv").write_text("\\n".join(rows[:3]) + "\\n")
first = open_store(folder, streams).images["brain-mr"]
print(first.shape, float(first[0, 0, 0, 0, 0]), float(first[0, 0, 0, 0, 7]))
np.savetxt(folder / "a.slices" / "7.txt", np.zeros((8, 8)))
print(float(open_store(folder, streams).images["brain-mr"][0, 0, 0, 0, 7]))
"""


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_reader_of_folders_costs_two_files(tmp_path):
    copy_packages(tmp_path, "panfm")
    before = snapshot(tmp_path)
    (tmp_path / "panfm" / "data" / "readers" / "slices.py").write_text(READER)
    registry = tmp_path / "panfm" / "registry.py"
    line = '{"slices": "panfm.data.readers.slices:SlicesReader", "nifti": '
    registry.write_text(registry.read_text().replace('{"nifti": ', line))
    after = snapshot(tmp_path)
    assert len([path for path in after if before.get(path) != after[path]]) == 2
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.splitlines() == [
        "twin.slices: found the same content as a.slices, expected an image of its own",
        "empty.slices: found a folder without slices, expected at least one",
        "(2, 1, 8, 8, 8) 0.0 1.0",
        "0.0",
    ], done.stderr
