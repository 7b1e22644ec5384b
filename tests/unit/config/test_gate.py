"""`[gate]` and `probe.tasks`: what is refused, and that private runs have neither."""

import pytest

from panfm.config import SiteConfig, parse_run
from panfm.errors import ConfigError
from panfm.privacy.guarantees import checked_run
from tests.unit.config.test_load import RUN

TASKS = '[probe]\ntasks = { stroke = ["stroke"], shape = ["shape-a", "shape-b"] }\n'
GATED = TASKS + "[gate]\n"
PATIENT_DP = """
[patient-dp]
epsilon = 8.0
delta = 1e-3
public-subjects = 100
noise-multiplier = 1.5
sample-rate = 0.1
[objective]
standardise = false
[masking]
policy = "random"
"""
SITE_DP = """
[federation]
min-sites = 5
[masking]
scope = "site"
[site-dp]
epsilon = 8.0
delta = 0.01
num-sites = 5
noise-multiplier = 2.0
"""


def test_nothing_is_asked_unless_the_run_says_so():
    run = parse_run(RUN)
    assert (run.gate, run.probe.tasks) == (None, {})
    run = parse_run(RUN + GATED)
    assert (run.gate.measure, run.probe.tasks["shape"]) == ("labels", ("shape-a", "shape-b"))
    assert parse_run(RUN + '[gate]\nmeasure = "validation-loss"\n').probe.tasks == {}


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ("[gate]\n", 'gate.measure: "labels" needs probe.tasks'),
        ('[gate]\nmeasure = "loss"\n', "gate.measure: found 'loss'"),
        ('[probe]\ntasks = { "A/B" = ["a"] }\n', r"probe.tasks.A/B: found 'A/B'"),
        ("[probe]\ntasks = { a = [] }\n", "probe.tasks.a: found .., expected at least 1"),
    ],
)
def test_a_gate_or_tasks_that_do_not_hold_are_one_line(extra, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        parse_run(RUN + extra)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("private", [PATIENT_DP, SITE_DP], ids=["patient-dp", "site-dp"])
@pytest.mark.parametrize(
    ("asked", "complaint"),
    [(TASKS, "probe.tasks: labels are summed"), ('[gate]\nmeasure = "validation-loss"\n', "gate.measure: is summed")],
)
def test_a_private_run_has_neither(private, asked, complaint):
    checked_run(parse_run(RUN + private))
    with pytest.raises(ConfigError, match=complaint):
        checked_run(parse_run(RUN + private + asked))


def test_a_site_gives_sums_of_labels_only_if_its_operator_names_them():
    assert "label-sums" not in SiteConfig(name="a").limits.may_leave
    limits = {"may-leave": ["updates", "counts", "label-sums"]}
    assert "label-sums" in SiteConfig.model_validate({"name": "a", "limits": limits}).limits.may_leave
