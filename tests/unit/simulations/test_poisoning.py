import io
from pathlib import Path

import pytest
import typer
from rich.console import Console

from panfm.config.sharing import GuardsConfig
from simulations.harness import ArmJob, CohortJob
from simulations.studies import poisoning_study as poisoning
from simulations.studies._federations import Federated
from simulations.studies.poisoning_study import (
    arms,
    damage,
    hostile_names,
    largest_share,
    show,
    study_run,
    targets,
)
from simulations.study_result import StudyResult


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Twenty patients at each of five sites, thirty held out."""
    patch.setattr(poisoning, "_SUBJECTS", (20,) * 5)
    patch.setattr(poisoning, "_HOLDOUT", 30)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small draw."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        return poisoning.write_draw(CohortJob(0, tmp_path_factory.mktemp("poisoning") / "cohort"))


def toy() -> StudyResult:
    """An attack costs 9 of 100 with the defaults, and everything without guards."""
    result = StudyResult("poisoning", {})
    for arm in arms():
        loss = 2.0 if "untrained" in arm else 1.0 if "honest" in arm else 1.09 if arm.endswith("default") else 3.0
        result.add(arm, {"val_loss": loss, "auc": 0.6, "site_share": 0.4 if arm.endswith("default") else 0.99})
    result.ratios = {f"damage/{arm}": damage(result, arm) for arm in arms() if "/" in arm}
    return result


def test_damage_is_relative_to_what_the_federation_gained():
    result = toy()
    assert result.ratios["damage/sign-flip/weighted/default"] == pytest.approx(0.09)
    assert result.ratios["damage/gate-mass/median/off"] == pytest.approx(2.0)
    assert all(target.is_met for target in targets(result, arms()))
    result.values["site_share", "inflated/trimmed/default"] = [0.51]
    result.ratios["damage/gate-mass/weighted/default"] = 0.11
    assert [target.is_met for target in targets(result, arms())] == [True] * 4 + [False] * 2


@pytest.mark.slow
@pytest.mark.long
def test_every_arm_is_a_run_of_its_own():
    described = {arm: study_run(arm, 0, 0, 10) for arm in arms() if "untrained" not in arm}
    dumps = [run.model_dump_json() for arm, run in described.items() if "/" not in arm]
    assert len(set(dumps)) == len(dumps) == 3
    assert described["honest"].sharing.guards == GuardsConfig()
    assert described["sign-flip/weighted/default"] == described["honest"]
    off = described["10:sign-flip/median/off"]
    assert (off.federation.max_share, off.sharing.guards.direction, off.sharing.mean) == (1.0, 2.0, "median")
    assert len(off.cohort["sites"]) == 10
    assert described["gate-mass/weighted/default"].sharing.experts == "pooled"


def test_every_organ_is_at_three_honest_sites_or_more():
    for arm in ("honest", "10:honest"):
        sites = study_run(arm, 0, 0, 10).cohort["sites"]
        honest = [site["organs"] for name, site in sites.items() if name not in hostile_names(arm)]
        assert min(sum(organ in organs for organs in honest) for organ in ("brain", "heart", "adipose", "liver")) >= 3
        assert hostile_names(arm) == sorted(sites)[-len(sites) // 5 :]


def test_the_largest_share_counts_where_three_sites_contribute():
    line = {
        "sites": {
            "site-01": {"shares": {"backbone": 0.3, "head": 0.0}},
            "site-02": {"shares": {"backbone": 0.3, "head": 0.1}},
            "site-05": {"shares": {"backbone": 0.4, "head": 0.9}},
        }
    }
    assert largest_share(Federated(None, [line, {"sites": {}}]), ["site-05"]) == 0.4
    assert largest_share(Federated(None, []), ["site-05"]) == 0.0


LONG_ARMS = [pytest.param(arm, marks=pytest.mark.long) for arm in ("gate-mass/weighted/default", "scaling/median/off")]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["inflated/weighted/default", *LONG_ARMS])
def test_an_arm_is_measured_over_real_messages(cohort, monkeypatch, arm):
    shrink(monkeypatch)
    measured = poisoning.measure(ArmJob(0, 0, arm, 3, cohort))
    assert set(measured) == {"val_loss", "auc", "site_share"}
    assert (measured["site_share"] <= 0.5) == arm.endswith("default") or arm.startswith("scaling")


def test_jobs_of_different_budgets_are_told_apart():
    assert str(ArmJob(0, 0, "honest", 10, Path())) != str(ArmJob(0, 0, "honest", 25, Path()))


def test_the_table_fits_80_columns():
    console = Console(width=80, soft_wrap=True, file=io.StringIO())
    show(toy(), arms(), console)
    lines = [line for line in console.file.getvalue().splitlines() if not line.startswith("target")]
    assert max(map(len, lines)) <= 80
    assert sum("+9.0%" in line for line in lines) == sum(arm.endswith("default") for arm in arms())


def test_some_arms_only():
    chosen = poisoning.arms_of("weighted/default")
    assert {arm for arm in chosen if "/" not in arm} == {arm for arm in arms() if "/" not in arm}
    assert {arm for arm in chosen if "/" in arm} == {arm for arm in arms() if arm.endswith("/weighted/default")}
    assert poisoning.arms_of("") == arms()
    with pytest.raises(typer.BadParameter, match="ends no arm"):
        poisoning.arms_of("wieghted")
