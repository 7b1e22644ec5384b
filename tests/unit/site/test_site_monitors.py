"""Monitors leave a site only where its operator names them, of enough patients, and in no private run."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from panfm.config.site_description import LimitsConfig, Releasable
from panfm.site import Site
from panfm.site.round_monitors import RoundMonitors
from tests.unit.site.test_private_site import GUIDED
from tests.unit.site.test_private_site import task as private_task
from tests.unit.site.test_site import task

OPEN = 'may-leave = ["updates", "counts", "monitors"]\n'
SITE_DP = """
[site-dp]
epsilon = 8.0
delta = 1e-3
num-sites = 4
noise-multiplier = 1.5
clip-norm = 1.0
[federation]
min-sites = 4
"""
FEATURES = {"effective-rank", "feature-deviation"}


@pytest.fixture
def make_site(tmp_path, write_site):
    def make(limits, name="alpha"):
        return Site(write_site(tmp_path / name, "alpha", ("brain", "heart"), extra=f"[limits]\n{limits}"))

    return make


def test_only_where_they_are_named(make_site):
    assert Releasable.MONITORS not in LimitsConfig().may_leave
    assert make_site('may-leave = ["updates", "counts", "loss", "saliency"]\n').train_round(task()).monitors == {}


def test_features_of_a_dense_model_and_experts_beside(make_site):
    assert set(make_site(OPEN).train_round(task()).monitors) == FEATURES
    experts = '[model]\nbackbone = "director-experts"\n'
    asked = task(extra=experts)
    asked = replace(
        asked, groups={name: flat for name, flat in asked.groups.items() if name not in ("experts", "router")}
    )
    told = make_site(OPEN, "beta").train_round(asked).monitors
    assert set(told) == FEATURES | {"experts-used"}
    assert 1.0 <= told["experts-used"] <= 8.0


def test_not_of_a_batch_below_the_floor(make_site):
    """Also of the last batch alone, which may be one that did not count."""
    site = make_site(OPEN)
    session, monitors = site._session(task().run_toml), RoundMonitors(site.folder, site.config)
    batches = [[1, 2, 3, 4], [1, 2, 2]]
    result = SimpleNamespace(
        monitors={"effective-rank": 2.0}, gate_mass={}, contributors_per_expert={}, batches=batches
    )
    for batch, told in ((2, {"effective-rank": 2.0}), (3, {}), (1, {"effective-rank": 2.0})):
        session.floors = replace(session.floors, batch=batch)
        assert monitors.after(session, task(), result, states=None) == told


@pytest.mark.parametrize("name", ["patient-dp", "site-dp"])
def test_in_no_private_run(make_site, name):
    asked = private_task(extra=GUIDED) if name == "patient-dp" else task(extra=SITE_DP)
    reply = make_site(OPEN).train_round(asked)
    assert reply.updates
    assert reply.monitors == {}
