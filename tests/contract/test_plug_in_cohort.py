"""A cohort of one's own costs its file and a line of the registry."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import copy_packages

SOURCE = '''
"""Cohorts of stripes: one site whose pictures are ramps of grey."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from simulations.cohorts.site_folder import write_site_folder
from panfm.outputs import new_folder
from simulations.cohorts.cohort_source import CohortSource, Progress, Streams, texts_of


class StripesCohort(CohortSource):
    """A cohort of stripes."""

    kind: Literal["stripes"]
    subjects: Annotated[int, Field(gt=0, le=100)] = 2

    def write(self, folder: Path, streams: Streams, progress: Progress = lambda *_: None) -> None:
        """Write one site."""
        (stream,) = streams
        with new_folder(folder) as partial:
            site = partial / "sites" / "zoo"
            site.mkdir(parents=True)
            for subject in range(self.subjects):
                ramp = np.arange(subject, 64 + subject, dtype=np.uint8).reshape(8, 8)
                Image.fromarray(ramp).save(site / f"{subject}.png")
                progress(subject + 1, self.subjects)
            rows = [(f"subject-{subject}", stream, f"{subject}.png", "train") for subject in range(self.subjects)]
            write_site_folder(site, rows)

    def fingerprint(self) -> list[object]:
        """This file."""
        return texts_of([Path(__file__)])
'''
RUN = """
name = "zebras"
organs = ["skin"]
[streams]
skin-photo = { shape = [8, 8], patch = [4, 4] }
[cohort]
kind = "stripes"
"""
PROGRAM = """
from pathlib import Path
from rich.console import Console
from panfm.data.check import check_site
from panfm.errors import ConfigError
from simulations.cohorts.prepare import load_simulation, prepare_cohort

path, console = Path("run.toml"), Console(quiet=True)
try:
    load_simulation(path, ["cohort.subjects=0"])
except ConfigError as error:
    print(error)
run = load_simulation(path)
print(run.cohort)
folder = prepare_cohort(run, console)
print(folder.name.rpartition("-")[0], len(check_site(folder / "sites" / "zoo", run.streams).rows))
other = load_simulation(path, ["cohort.subjects=3"])
print(prepare_cohort(run, console) == folder, prepare_cohort(other, console) == folder)
"""


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_cohort_costs_two_files(tmp_path):
    copy_packages(tmp_path, "panfm", "simulations")
    before = snapshot(tmp_path)
    cohorts = tmp_path / "simulations" / "cohorts"
    (cohorts / "stripes.py").write_text(SOURCE)
    registry, anchor = cohorts / "__init__.py", '        "phantom": '
    line = '        "stripes": "simulations.cohorts.stripes:StripesCohort",\n'
    assert anchor in registry.read_text()
    registry.write_text(registry.read_text().replace(anchor, line + anchor))
    after = snapshot(tmp_path)
    assert len([path for path in after if before.get(path) != after[path]]) == 2
    (tmp_path / "run.toml").write_text(RUN)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.splitlines() == [
        "run.toml: cohort.subjects: found 0, expected a number above 0",
        "{'kind': 'stripes', 'subjects': 2}",
        "stripes 2",
        "True False",
    ], done.stderr
