from dataclasses import replace

import pytest

from panfm import __version__
from panfm.config import config_hash
from panfm.errors import RunError
from panfm.models import build_model
from panfm.sharing.groups import GroupManifest
from panfm.sharing.messages import Handshake
from server.handshake import check_handshake


@pytest.fixture
def run(make_run):
    return make_run()


@pytest.fixture
def manifest(run) -> GroupManifest:
    return GroupManifest.of({name: tuple(value.shape) for name, value in build_model(run).state_dict().items()})


def good(run, manifest) -> Handshake:
    groups = {group: manifest.hashes()[group] for group in ("backbone", "head", "stream:brain-mr")}
    return Handshake("a", 5, {"brain-mr": 5}, {"panfm": __version__}, config_hash(run), groups)


def test_a_site_that_fits(run, manifest):
    check_handshake(good(run, manifest), run, manifest)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda h: {"versions": {"panfm": "0.0.1"}}, r"panfm 0\.0\.1, the server has"),
        (lambda h: {"versions": {}}, "panfm None"),
        (lambda h: {"config_hash": "other"}, "configuration hash"),
        (lambda h: {"group_hashes": {**h.group_hashes, "head": "other"}}, "the parameters of head differ"),
        (lambda h: {"group_hashes": {**h.group_hashes, "experts": "x"}}, "unknown group 'experts'"),
        (lambda h: {"streams": {"heart-ct": 5}}, "expected .*stream:heart-ct"),
        (lambda h: {"streams": {}}, "expected"),
    ],
)
def test_a_mismatch_names_the_site_and_the_difference(run, manifest, change, why):
    handshake = good(run, manifest)
    with pytest.raises(RunError, match=f"site a: .*{why}"):
        check_handshake(replace(handshake, **change(handshake)), run, manifest)


def test_under_the_plain_rule_every_site_trains_all_groups(run, manifest):
    plain = run.model_copy(update={"sharing": run.sharing.model_copy(update={"rule": "plain"})})
    handshake = replace(good(plain, manifest), config_hash=config_hash(plain))
    with pytest.raises(RunError, match="site a: trains"):
        check_handshake(handshake, plain, manifest)
    check_handshake(replace(handshake, group_hashes=manifest.hashes()), plain, manifest)
