"""Small real objects for all tests: a run with two volumes and an image stream, and stores of random subjects."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from panfm.config import RunConfig, parse_run
from panfm.data.store import ImageStore

torch.set_num_threads(1)

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


@pytest.fixture
def make_run() -> Callable[..., RunConfig]:
    """A small run; extra TOML text may add tables."""
    return lambda extra="": parse_run(SMALL_RUN + extra)


@pytest.fixture
def make_store() -> Callable[..., ImageStore]:
    """A store of random subjects; every stream is held with probability 0.7, every subject holds one."""

    def make(run: RunConfig, num_subjects: int = 12, *, seed: int = 0, complete: bool = False) -> ImageStore:
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
