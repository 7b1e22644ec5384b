"""Settings that break the promise of a private run are refused wherever a run description is read, in one line."""

import pytest
from typer.testing import CliRunner

from panfm.cli import main as panfm
from panfm.config import RunConfig, dump_toml, parse_run
from panfm.errors import ConfigError, ProtocolError
from panfm.privacy.guarantees import NO_CLAIM, checked_run, claim, privacy_label
from panfm.sharing.messages import Invitation
from panfm.site import Site
from panfm.site.dry_run import dry_run
from panfm.training.trainer import Trainer
from server.coordinator import app as server
from server.run_folder import RunFolder
from simulations.__main__ import app as simulations

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
ACKNOWLEDGED = "acknowledge-broken-guarantee = true\n"
SITE_PRIVACY = """
[site-dp]
epsilon = 6.0
delta = 1e-2
num-sites = 10
noise-multiplier = 5.0
"""
ALL = "[federation]\nmin-sites = 10\n"
DEX = '[model]\nbackbone = "director-experts"\n'
BROKEN = [
    ('[objective]\nname = "dino"\n[masking]\npolicy = "random"\n', PRIVACY, "objective.name: "),
    ('[masking]\npolicy = "random"\n', PRIVACY, "objective.standardise: "),
    ("[objective]\nstandardise = false\n", PRIVACY, "masking.saliency: "),
    (
        SOUND,
        PRIVACY.replace("1e-3", "1.01e-3"),
        "patient-dp.delta: 0.00101 is above 1 / (10 public-subjects), set at most 0.001",
    ),
    (SOUND + '[model]\nbackbone = "director-experts"\n', PRIVACY, "model.experts.balance-weight: "),
    (SOUND + "[features]\nwhitening = true\n", PRIVACY, "features.whitening: "),
]


def test_a_sound_private_run_says_what_it_promises():
    run = checked_run(parse_run(STREAMS + SOUND + PRIVACY))
    assert claim(run) == "(8, 0.001)-DP per patient of one site, add-or-remove-one"
    assert claim(parse_run(STREAMS)) is None


@pytest.mark.parametrize(("tables", "privacy", "complaint"), BROKEN)
def test_what_breaks_the_guarantee_is_refused_in_one_line(tables, privacy, complaint):
    with pytest.raises(ConfigError) as caught:
        checked_run(parse_run(STREAMS + tables + privacy))
    [line] = str(caught.value).splitlines()
    assert complaint in line
    assert "set " in line


@pytest.mark.parametrize(("tables", "privacy", "complaint"), BROKEN)
def test_what_is_acknowledged_runs_without_a_claim(tables, privacy, complaint):
    assert claim(checked_run(parse_run(STREAMS + tables + privacy + ACKNOWLEDGED))) == NO_CLAIM


def test_a_sound_run_with_site_level_privacy_says_what_it_promises():
    assert privacy_label(parse_run(STREAMS + SITE_PRIVACY + ALL)) == "(6, 0.01)-DP per site, zero-out, server trusted"
    assert privacy_label(parse_run(STREAMS)) == "none"
    sees_the_noised_mean_alone = '[sharing.optimiser]\nkind = "adam"\n'
    checked_run(parse_run(STREAMS + SITE_PRIVACY + ALL + sees_the_noised_mean_alone))


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
        ("[features]\nwhitening = true\n", "features.whitening: "),
    ],
)
def test_what_breaks_the_site_level_guarantee_is_refused_in_one_line(tables, complaint):
    with pytest.raises(ConfigError) as caught:
        checked_run(parse_run(STREAMS + tables + SITE_PRIVACY + ("" if "[federation]" in tables else ALL)))
    [line] = str(caught.value).splitlines()
    assert complaint in line
    assert "set " in line or "leave it out" in line


def test_a_delta_too_large_for_the_sites_is_refused():
    run = parse_run(STREAMS + SITE_PRIVACY.replace("delta = 1e-2", "delta = 2e-2") + ALL)
    with pytest.raises(ConfigError, match=r"1 / \(10 num-sites\), set at most 0.01"):
        checked_run(run)
    assert privacy_label(run) == NO_CLAIM


def test_a_private_run_has_no_proximal_term_acknowledged_or_not():
    for acknowledged in ("", ACKNOWLEDGED):
        with pytest.raises(ConfigError, match=r"plan\.toml: train.proximal-mu: not done in private runs, set 0"):
            checked_run(
                parse_run(STREAMS + SOUND + "[train]\nproximal-mu = 0.1\n" + PRIVACY + acknowledged), "plan.toml"
            )


def broken_runs() -> list[RunConfig]:
    return [
        parse_run(STREAMS + PRIVACY),
        parse_run(STREAMS + SITE_PRIVACY + "[federation]\nmin-sites = 9\n"),
        parse_run(STREAMS + SOUND + "[train]\nproximal-mu = 0.1\n" + PRIVACY),
    ]


@pytest.mark.parametrize("run", broken_runs())
@pytest.mark.parametrize(
    "door", ["run folder", "resume", "trainer", "site", "dry run", "panfm site dry-run", "server start", "simulation"]
)
def test_every_door_refuses_a_promise_that_cannot_be_kept(door, run, tmp_path, write_site):
    with pytest.raises((ConfigError, ProtocolError)) as caught:
        enter(door, run, tmp_path, write_site)
    with pytest.raises(ConfigError) as expected:
        checked_run(run)
    assert str(caught.value).split(": ", 1)[1] == str(expected.value).split(": ", 1)[1]


def enter(door, run, tmp_path, write_site):
    path = tmp_path / "run.toml"
    path.write_text(dump_toml(run))
    match door:
        case "run folder":
            RunFolder.create(tmp_path / "run", run)
        case "resume":
            RunFolder.resume(tmp_path)
        case "trainer":
            Trainer(run)
        case "site":
            site = Site(write_site(tmp_path / "alpha", "alpha", ("brain",)))
            site.handshake(Invitation(dump_toml(run)))
        case "dry run":
            dry_run(write_site(tmp_path / "alpha", "alpha", ("brain",)), run)
        case "panfm site dry-run":
            words = ["site", "dry-run", str(tmp_path), "--run", str(path)]
            raise ConfigError(CliRunner().invoke(panfm, words, catch_exceptions=False).stderr.rstrip())
        case "server start":
            CliRunner().invoke(server, ["start", str(path), "--connection", "x"], catch_exceptions=False)
        case "simulation":
            CliRunner().invoke(simulations, ["run", str(path)], catch_exceptions=False)
