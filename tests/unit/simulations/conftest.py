from pathlib import Path

import pytest

from simulations.harness import CohortJob
from simulations.studies._modalities import write_draw


@pytest.fixture(scope="session")
def picture_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small draw of the ten-modality pictures."""
    return write_draw(CohortJob(3, tmp_path_factory.mktemp("pictures") / "3", subjects=14, holdout=14))
