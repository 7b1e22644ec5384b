"""The monitor `presence-leakage` of a round: of which patients and organs, where, and that it changes nothing."""

from dataclasses import replace

import numpy as np
import pytest

from panfm.data.cache import open_store
from panfm.evaluate.embed import embed_store
from panfm.evaluate.leakage import presence_variance
from panfm.site import Site
from tests.unit.site.test_site import same, task
from tests.unit.site.test_validation_probe import hold_out, trained_model

OPEN = """[limits]
smallest-batch = {least}
smallest-steps = 1
may-leave = ["updates", "counts"{monitors}]
"""


@pytest.fixture
def make_site(tmp_path, write_site):
    """Makes a site of 12 patients, the last of whom are for validation."""

    def make(name="alpha", organs=("brain", "heart"), monitors=', "monitors"', least=1, held_out=4):
        extra = OPEN.format(least=least, monitors=monitors)
        folder = write_site(tmp_path / name, "alpha", organs, subjects=12, extra=extra)
        hold_out(folder, range(12 - held_out, 12))
        return Site(folder)

    return make


def told(site, without=()):
    asked = task()
    groups = {name: flat for name, flat in asked.groups.items() if name not in without}
    return site.train_round(replace(asked, groups=groups)).monitors.get("presence-leakage")


def test_it_is_the_share_of_validation_patients_by_the_trained_model(make_site):
    """Two organs, so that the sets are one of them and the other."""
    site, asked = make_site(), task()
    reply = site.train_round(asked)
    model, run = trained_model(site, reply, asked)
    store = open_store(site.folder, run.streams)
    features = [embed_store(model, store, np.arange(8, 12), [name], batch_size=3) for name in ("brain-mr", "heart-mr")]
    expected = presence_variance(np.stack(features), np.ones((1, 4)))[0]
    assert 0.0 < reply.monitors["presence-leakage"] == pytest.approx(expected, rel=1e-5)


def test_it_changes_nothing_of_the_round(make_site):
    open_site, closed = make_site(), make_site("beta", monitors="")
    for number in (1, 2):
        one, other = (site.train_round(task(number)) for site in (open_site, closed))
        assert "presence-leakage" in one.monitors
        assert other.monitors == {}
        one.monitors.clear()
        assert same(one, other)


def test_one_organ_tells_nothing_of_which_are_present(make_site):
    assert told(make_site(organs=("brain",)), without=["stream:heart-mr"]) is None


def test_not_of_fewer_patients_than_the_site_asks_for(make_site):
    assert told(make_site(least=3, held_out=3)) is not None
    assert told(make_site("beta", least=3, held_out=2)) is None


@pytest.mark.parametrize("held_out", [0, 1])
def test_not_of_one_patient_or_none(make_site, held_out):
    assert told(make_site(held_out=held_out)) is None
