"""The example of a plug-in package: installed into an environment of its own, it trains a round."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from panfm.config import load_run
from panfm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "plug-in"


@pytest.fixture
def python(tmp_path):
    """An environment that sees this one's libraries and the package, which this one does not have."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    place = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    ours = sysconfig.get_path("purelib")
    (Path(place) / "libraries.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    words = ["install", "--no-index", "--no-deps", "--no-build-isolation", "--quiet", str(EXAMPLE)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *words], check=True)
    return python


def write_data(folder: Path) -> None:
    random = np.random.default_rng(0)
    for site in ("clinic", "hospital"):
        rows = ["subject,stream,path,split"]
        for subject in range(5):
            series = folder / "sites" / site / f"{subject}.slices"
            series.mkdir(parents=True)
            for number in range(8):
                np.savetxt(series / f"{number}.txt", random.uniform(0, 1000, (8, 8)))
            rows.append(f"{site}-{subject},brain-mr,{series.name},{'val' if subject == 4 else 'train'}")
        text = f'name = "{site}"\n[limits]\nsmallest-batch = 1\nsmallest-steps = 1\n'
        (folder / "sites" / site / "site.toml").write_text(text)
        (folder / "sites" / site / "manifest.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.slow
def test_the_example_package_trains_a_round_with_its_own_objective_and_reader(tmp_path, python):
    write_data(tmp_path / "data")
    words = ["-m", "simulations", "run", str(EXAMPLE / "run.toml"), "--out", "run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    [line] = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    sites = json.loads(line)["sites"]
    assert sorted(sites) == ["clinic", "hospital"]
    assert all(0.0 < site["loss"] < 4.0 for site in sites.values())
    with pytest.raises(ConfigError, match=r"objective.name: found 'cosine', expected one of latent"):
        load_run(EXAMPLE / "run.toml")  # the package is not installed here
