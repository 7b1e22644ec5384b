"""What travels: Flower's app bundle holds no library, the wheel holds nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

ROOT = Path(__file__).resolve().parents[2]


def members(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as bundle:
        return {name for name in bundle.namelist() if not name.endswith("/")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern")
def test_the_app_bundle_has_the_apps_and_no_library(tmp_path):
    path = tmp_path / "app.fab"
    path.write_bytes(build_fab_from_disk(ROOT))
    found = members(path)
    for name in ("server/app.py", "client/app.py", "strategies/grouped.py", "configs/experiments/quickstart.toml"):
        assert name in found
    kinds = {name.split("/")[0] for name in found if "/" in name}
    assert kinds - {".info"} == {"server", "client", "strategies", "configs"}


@pytest.mark.slow
def test_the_wheel_has_the_library_only(tmp_path):
    words = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), str(ROOT)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    assert {name.split("/")[0] for name in members(wheel)} == {"panfm", "panfm-0.1.0.dist-info"}
    assert {"panfm/py.typed", "panfm/__init__.pyi", "panfm/report/templates/report.css"} <= members(wheel)


@pytest.mark.slow
def test_the_wheel_of_simulations_has_the_rest(tmp_path):
    folder = ROOT / "distributions" / "simulation"
    words = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), str(folder)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    kinds = {name.split("/")[0] for name in members(wheel)}
    assert kinds == {"simulations", "server", "client", "strategies", "panfm_simulation-0.1.0.dist-info"}
