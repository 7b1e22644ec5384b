from pathlib import Path

import pytest
import safetensors.torch
import tomli_w
from rich.console import Console
from typer.testing import CliRunner

from panfm.cli import main
from simulations.cohorts.prepare import WEIGHTS, load_simulation, prepare_cohort
from simulations.harness import CohortJob
from simulations.preflight import check_before
from simulations.studies._modalities import write_draw
from tests.unit.models.test_public_weights import random_dinov2

STREAM = "{ spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }"


@pytest.fixture(scope="session")
def picture_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small draw of the ten-modality pictures."""
    return write_draw(CohortJob(3, tmp_path_factory.mktemp("pictures") / "3", subjects=14, holdout=14))


@pytest.fixture
def nano_weights(tmp_path, monkeypatch):
    """Random public weights of a nano model, which the environment names."""
    safetensors.torch.save_file(random_dinov2(patch=14), tmp_path / "vit.safetensors")
    monkeypatch.setenv(WEIGHTS, str(tmp_path / "vit.safetensors"))


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """Two sites, a hold-out with labels at all of them, and a short description; runs `panfm simulate` on it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("simulations.simulate.run_job", lambda *_: pytest.fail("training began"))
    return Attempt(tmp_path)


class Attempt:
    """The image files do not exist: checks before training must not need them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("a", "b", "held"):
            (folder / name).mkdir()
            (folder / name / "site.toml").write_text(f'name = "{name}"\nlabels = "labels.csv"\n')
            split = "test" if name == "held" else "train"
            rows = [
                f"{name}-{n},brain-mr,{name}-{n}.nii.gz,{'val' if (split, n) == ('train', 11) else split}"
                for n in range(12)
            ]
            (folder / name / "manifest.csv").write_text("\n".join(["subject,stream,path,split", *rows]) + "\n")
            self.label(name, sick=["0", "1"], sex=["F", "M"])
        self.describe()

    def describe(self, streams=f"brain-mr = {STREAM}", sites=("a", "b"), more=""):
        cohort = {"kind": "folder", "sites": list(sites), "holdout": "held"}
        text = f'name = "first"\n{more}\n{tomli_w.dumps({"cohort": cohort})}\n[streams]\n{streams}\n'
        (self.folder / "run.toml").write_text(text)

    def label(self, name, **values):
        subjects = [f"{name}-{number}" for number in range(12)]
        rows = [",".join([s, *(v[i % len(v)] for v in values.values())]) for i, s in enumerate(subjects)]
        (self.folder / name / "labels.csv").write_text("\n".join([",".join(["subject", *values]), *rows]) + "\n")

    def edit(self, file, change):
        path = self.folder / file
        path.write_text(change(path.read_text()))

    def told(self, *words):
        """The one line of a refusal; lines about label tables may come before it if they are the reason."""
        begin = [] if "--resume" in words else ["run.toml"] if "--out" in words else ["run.toml", "--out", "out"]
        done = CliRunner().invoke(main, ["simulate", *begin, *map(str, words)])
        assert done.exit_code == 1, done.output
        assert not (self.folder / "out").exists()
        *notes, line = done.stderr.splitlines()
        assert not notes or "label" in line
        return line

    def lines(self):
        """Lines printed before a run that would begin."""
        run = load_simulation(self.folder / "run.toml")
        return check_before(run, prepare_cohort(run, Console(quiet=True)))
