import pytest

from panfm.config import RunConfig, parse_run


@pytest.fixture
def small_run() -> RunConfig:
    stream = "{ spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 4] }"
    return parse_run(f'name = "small"\n[streams]\nbrain-mr = {stream}\nheart-mr = {stream}\n')
