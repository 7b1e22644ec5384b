"""What the table `[site-dp]` refuses: one line each, with the field and the remedy."""

import pytest

from panfm.config import parse_run
from panfm.errors import ConfigError

RUN = """
name = "small"
[streams]
brain-mr = { spacing-mm = [2.0, 2.0, 2.0], shape = [8, 8, 4], patch = [4, 4, 4] }
"""
TABLE = """
[site-dp]
epsilon = 6.0
delta = 1e-2
num-sites = 10
noise-multiplier = 5.0
"""
ALL = "[federation]\nmin-sites = 10\n"


@pytest.mark.parametrize(
    ("found", "instead", "complaint"),
    [
        ("num-sites = 10", "num-sites = 1", "num-sites"),
        ("noise-multiplier = 5.0", "noise-multiplier = inf", "noise-multiplier"),
        ("epsilon = 6.0", "epsilon = 6.0\nclip-norm = 65.0", "clip-norm"),
        ("epsilon = 6.0", "epsilon = 6.0\nadaptive-clipping = true", "adaptive-clipping: .* set clip-norm"),
        ("epsilon = 6.0", "epsilon = 6.0\nseed = 3", "seed: .* leave it out"),
        ("epsilon = 6.0", "epsilon = 6.0\nsample-rate = 0.5", "sample-rate: .* leave it out"),
    ],
)
def test_numbers_and_habits(found, instead, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_run(RUN + TABLE.replace(found, instead) + ALL)
