"""What a run with site-level privacy may not ask for: one line each, with the field and the remedy."""

import pytest

from panfm.config import parse_run
from panfm.config.privacy import privacy_label
from panfm.errors import ConfigError

RUN = """
name = "small"
[streams]
brain-mr = { spacing-mm = [2.0, 2.0, 2.0], shape = [8, 8, 4], patch = [4, 4, 4] }
"""
TABLE = """
[server-privacy]
epsilon = 6.0
delta = 1e-2
num-sites = 10
noise-multiplier = 5.0
"""
ALL = "[federation]\nmin-sites = 10\n"
DEX = '[model]\nbackbone = "director-experts"\n'


def test_a_sound_run_says_what_it_promises():
    assert privacy_label(parse_run(RUN + TABLE + ALL)) == "(6, 0.01)-DP per site, zero-out, server trusted"
    assert privacy_label(parse_run(RUN)) == "none"
    parse_run(RUN + TABLE + ALL + '[sharing.optimiser]\nkind = "adam"\n')  # sees the noised mean alone


@pytest.mark.parametrize(
    ("tables", "complaint"),
    [
        ('[sharing]\nmean = "median"\n', "sharing.mean: "),
        ('[sharing]\nmean = "l-dawa"\n', "sharing.mean: "),
        ('[sharing.groups.head]\nmean = "trimmed"\n', "sharing.groups.head.mean: "),
        (DEX + '[sharing]\nexperts = "pooled"\n', "sharing.experts: "),
        ("[sharing.guards]\ndirection = 0.4\n", "sharing.guards.direction: "),
        (ALL + "participation = 0.5\n", "federation.participation: "),
        ("[federation]\nmin-sites = 9\n", "federation.min-sites: "),
        ('[masking]\nscope = "federation"\n', "masking.scope: "),
    ],
)
def test_what_breaks_the_guarantee_is_refused_in_one_line(tables, complaint):
    with pytest.raises(ConfigError) as caught:
        parse_run(RUN + tables + TABLE + ("" if "[federation]" in tables else ALL))
    [line] = str(caught.value).splitlines()
    assert complaint in line
    assert "set " in line or "leave it out" in line


@pytest.mark.parametrize(
    ("found", "instead", "complaint"),
    [
        ("delta = 1e-2", "delta = 2e-2", r"1 / \(10 num-sites\), set at most 0.01"),
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
