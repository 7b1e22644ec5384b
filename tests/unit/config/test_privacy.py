"""What the table `[patient-dp]` refuses: one line each, with the field and the remedy."""

import pytest

from panfm.config import parse_run
from panfm.errors import ConfigError

STREAMS = """
name = "small"
[streams]
brain-mr = { spacing-mm = [2.0, 2.0, 2.0], shape = [8, 8, 4], patch = [4, 4, 4] }
"""
SOUND = """
[masking]
policy = "random"
[objective]
standardise = false
"""
PRIVACY = """
[patient-dp]
epsilon = 8.0
delta = 1e-3
public-subjects = 100
noise-multiplier = 1.5
sample-rate = 0.1
"""


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("seed = 3", "leave it out"),
        ('sampling = "shuffle"', "leave it out"),
        ("batch-size = 32", "set sample-rate"),
        ("adaptive-clipping = true", "set clip-norm"),
        ("release-loss = true", "leave it out"),
        ("release-counts = true", "set public-subjects"),
    ],
)
def test_habits_of_other_frameworks_are_refused_with_the_remedy(line, remedy):
    with pytest.raises(ConfigError) as caught:
        parse_run(STREAMS + SOUND + PRIVACY + line + "\n")
    [found] = str(caught.value).splitlines()
    assert line.split(" ")[0] + ": " in found
    assert "patient-dp" in found
    assert remedy in found


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ("objective", 'centring = "sinkhorn"'),
        ("objective", "koleo-weight = 0.1"),
        ("objective", 'reduction = "tokens of the batch"'),
        ("model", 'norm = "batch"'),
        ("train", "shuffle = true"),
        ("model.experts", "private = false"),
    ],
)
def test_what_this_project_does_not_have_is_refused_by_name(table, line):
    key = f"{table}.{line.split(' ')[0]}"
    with pytest.raises(ConfigError) as caught:
        parse_run(f"{STREAMS}[masking]\npolicy = 'random'\n[{table}]\n{line}\n{PRIVACY}")
    assert any(f"{key}: unknown key" in found for found in str(caught.value).splitlines())


@pytest.mark.parametrize("line", ["noise-multiplier = inf", "clip-norm = 0.0", "epsilon = nan", "sample-rate = 1.5"])
def test_numbers_that_make_no_sense_are_refused(line):
    key = line.split(" ")[0]
    kept = "\n".join(each for each in PRIVACY.splitlines() if not each.startswith(key))
    with pytest.raises(ConfigError, match=f"patient-dp.{key}"):
        parse_run(STREAMS + SOUND + kept + f"\n{line}\n")
