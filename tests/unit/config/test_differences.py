from pathlib import Path

import pytest

from panfm.config import parse_run
from panfm.config.differences import check_same_run, differences
from panfm.errors import ConfigError
from tests.conftest import SMALL_RUN


def test_differences_are_named_by_their_keys():
    run = parse_run(SMALL_RUN)
    other = parse_run(SMALL_RUN.replace("rounds = 2", "rounds = 40") + "[augment]\n")
    assert differences(run, run) == []
    changed = differences(other, run)
    assert changed[-1] == "train.rounds: found 40, expected 2" or "train.rounds: found 40, expected 2" in changed
    assert any(line.startswith("augment.") and line.endswith("expected 'nothing'") for line in changed)


def test_an_edited_description_is_one_line():
    run, other = parse_run(SMALL_RUN), parse_run(SMALL_RUN.replace("seed = 7", "seed = 8"))
    check_same_run(Path("run.toml"), run, run)
    with pytest.raises(ConfigError) as caught:
        check_same_run(Path("run.toml"), other, run)
    assert str(caught.value) == (
        "run.toml: differs from the run that began: seed: found 8, expected 7; "
        "start a new run, or go on with more rounds by --extend rounds=N"
    )
