from pathlib import Path

import pytest
import safetensors.torch

from simulations.cohorts.prepare import WEIGHTS
from simulations.harness import CohortJob
from simulations.studies._modalities import write_draw
from tests.unit.models.test_public_weights import random_dinov2


@pytest.fixture(scope="session")
def picture_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small draw of the ten-modality pictures."""
    return write_draw(CohortJob(3, tmp_path_factory.mktemp("pictures") / "3", subjects=14, holdout=14))


@pytest.fixture
def nano_weights(tmp_path, monkeypatch):
    """Random public weights of a nano model, which the environment names."""
    safetensors.torch.save_file(random_dinov2(patch=14), tmp_path / "vit.safetensors")
    monkeypatch.setenv(WEIGHTS, str(tmp_path / "vit.safetensors"))
