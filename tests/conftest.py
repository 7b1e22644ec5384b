"""Small real objects for all tests: a run with two volumes and an image stream, and stores of random subjects."""

import gc
import gzip
import os
import tomllib
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel
import numpy as np
import pytest
import tomli_w
from hypothesis import HealthCheck, settings

from panfm.config import RunConfig, parse_run
from panfm.sharing.groups import GroupManifest

if TYPE_CHECKING:
    from panfm.data.store import ImageStore

os.environ["OMP_NUM_THREADS"] = "1"  # of torch, which the process that hands out the tests does not import
settings.register_profile(
    "same-everywhere",  # no clock, no chance: a busy machine gives the answers of an idle one
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("same-everywhere")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Exclude the objects of all collected tests from garbage collection, which would free none of them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def own_umask() -> Iterator[None]:
    """Run every test under the usual umask: a command that one of them runs in this process may set another."""
    before = os.umask(0o022)
    yield
    os.umask(before)


SMALL_RUN = """
name = "small"
seed = 7
organs = ["brain", "heart", "eye"]
[streams]
brain-mr = { spacing-mm = [2.0, 2.0, 2.0], shape = [8, 8, 4], patch = [4, 4, 4] }
heart-ct = { spacing-mm = [2.0, 2.0, 2.0], shape = [8, 4, 4], patch = [4, 4, 4] }
eye-fundus = { shape = [8, 8], patch = [4, 4], channels = 3 }
[train]
rounds = 2
local-steps = 4
batch-size = 6
"""


def manifest_of(groups: dict[str, dict[str, tuple[int, ...]]]) -> GroupManifest:
    """Manifest of made-up parameters: group -> name -> shape."""
    group_of = {name: group for group, shapes in groups.items() for name in shapes}
    return GroupManifest.of(
        group_of, {name: np.empty(shape) for shapes in groups.values() for name, shape in shapes.items()}
    )


NO_FLOORS = {"smallest-batch": 1, "smallest-steps": 1}
"""Limits of sites whose patients are drawn."""


@pytest.fixture
def make_run() -> Callable[..., RunConfig]:
    """A small run; extra TOML text may add tables."""
    return lambda extra="": parse_run(SMALL_RUN + extra)


@pytest.fixture
def make_store() -> "Callable[..., ImageStore]":
    """A store of random subjects; every stream is held with probability 0.7, every subject holds one."""
    from panfm.data.store import ImageStore

    def make(run: RunConfig, num_subjects: int = 12, *, seed: int = 0, complete: bool = False) -> "ImageStore":
        random = np.random.default_rng(seed)
        present = (random.random((num_subjects, len(run.streams))) < 0.7) | complete
        present[np.arange(num_subjects), random.integers(0, len(run.streams), num_subjects)] = True
        images, rows = {}, {}
        for index, (name, stream) in enumerate(run.streams.items()):
            rows[name] = np.flatnonzero(present[:, index])
            images[name] = random.random((len(rows[name]), stream.channels, *stream.shape), dtype=np.float32)
        subjects = tuple(f"s{index}" for index in range(num_subjects))
        return ImageStore(subjects, ("train",) * num_subjects, images, rows)

    return make


@cache
def images_of_noise(name: str, organs: tuple[str, ...], subjects: int) -> Mapping[str, bytes]:
    """File name -> bytes of MR noise, 8 x 8 x 8 voxels of 8 mm; cached, as hundreds of tests write the same files."""
    random, files = np.random.default_rng(list(name.encode())), {}
    for subject in range(subjects):
        for organ in organs:
            volume = random.uniform(0, 1000, size=(8, 8, 8)).astype(np.int16)
            image = nibabel.Nifti1Image(volume, np.diag([8.0, 8.0, 8.0, 1.0]))
            files[f"{name}-{subject}-{organ}.nii.gz"] = gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)
    return files


@pytest.fixture(scope="session")
def write_site() -> Callable[..., Path]:
    """Writes a site folder of MR noise; the last subject is for validation. No floors."""

    def write(folder: Path, name: str, organs: tuple[str, ...], subjects: int = 6, *, extra: str = "") -> Path:
        folder.mkdir(parents=True)
        table = tomllib.loads(extra)
        table["limits"] = NO_FLOORS | table.get("limits", {})
        (folder / "site.toml").write_text(tomli_w.dumps({"name": name} | table))
        for path, content in images_of_noise(name, organs, subjects).items():
            (folder / path).write_bytes(content)
        rows = ["subject,stream,path,split"]
        for subject in range(subjects):
            split = "val" if subject == subjects - 1 else "train"
            rows += [f"{name}-{subject},{organ}-mr,{name}-{subject}-{organ}.nii.gz,{split}" for organ in organs]
        (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
        return folder

    return write
