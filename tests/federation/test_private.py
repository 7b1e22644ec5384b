"""A private federation: each site stops at its own budget, and the run goes on with the others."""

import io
import json
from functools import cache

import pytest
import safetensors.numpy
import tomli_w
from rich.console import Console
from typer.testing import CliRunner

from panfm.cli import main
from panfm.errors import RunError
from panfm.files import read_checked
from panfm.privacy import ledger
from panfm.privacy.ledger import FILE
from panfm.report.console_tables import print_tables
from panfm.report.report_page import write_report
from panfm.report.run_files import read_run
from tests.conftest import NO_FLOORS

PRIVATE = (
    "objective.standardise=false",
    "masking.policy=random",
    "federation.min-sites=1",
    "patient-dp.epsilon=10.0",
    "patient-dp.delta=1e-3",
    "patient-dp.public-subjects=50",
    "patient-dp.noise-multiplier=1.0",
    "patient-dp.sample-rate=0.5",
)
COSTS = [3.170, 4.492, 5.569, 6.532]
"""Epsilon after so many rounds of two steps."""
BUDGETS = {"alpha": 5.0, "beta": 4.0, "delta": 6.0}
"""Enough for two, one and three rounds; gamma has the run's."""


@pytest.fixture
def four_sites(federation, write_site, monkeypatch):
    told = cache(ledger.epsilon)  # four sites ask the same
    monkeypatch.setattr(ledger, "epsilon", lambda mechanisms, delta: told(tuple(mechanisms), delta))
    write_site(federation.sites / "delta", "delta", ("brain", "heart"))
    for name, epsilon in BUDGETS.items():
        limits = NO_FLOORS | {"epsilon": epsilon, "delta": 1e-3, "public-subjects": 50}
        (federation.sites / name / "site.toml").write_text(tomli_w.dumps({"name": name, "limits": limits}))
    return federation


def spent(federation, site):
    return [json.loads(line)["epsilon"] for line in ledger_lines(federation, site)[1:]]


def rounds(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_each_site_stops_at_its_own_budget_over_all_runs(four_sites):
    first = four_sites.run("first", *PRIVATE)
    lines = rounds(first)
    assert [sorted(line["sites"]) for line in lines] == [
        ["alpha", "beta", "delta", "gamma"],
        ["alpha", "delta", "gamma"],
        ["delta", "gamma"],
    ]
    assert "BudgetError: this site's privacy budget" in lines[1]["rejected"]["beta"]
    assert all(line["loss"] is None for line in lines)
    metadata = json.loads((first / "model" / "metadata.json").read_text())
    assert metadata["privacy"] == "(10, 0.001)-DP per patient of one site, add-or-remove-one"
    for site, limit in (BUDGETS | {"gamma": 10.0}).items():
        assert max(spent(four_sites, site)) <= limit
    assert spent(four_sites, "gamma") == pytest.approx(COSTS[:3], abs=0.02)
    second = four_sites.run("second", *PRIVATE, "train.rounds=1")
    assert list(rounds(second)[0]["sites"]) == ["gamma"]
    assert spent(four_sites, "gamma") == pytest.approx(COSTS, abs=0.02)


@pytest.mark.slow
def test_a_run_ends_when_too_few_sites_can_pay(four_sites):
    with pytest.raises(RunError, match="BudgetError"):
        four_sites.run("first", *PRIVATE, "federation.min-sites=4")


@pytest.mark.slow
def test_experts_router_and_heads_are_trained_by_the_private_step(four_sites):
    """A private Director-Experts federation: what never leaves a site moves under the same permit and no other."""
    dex = ("model.backbone=director-experts", "model.experts.balance-weight=[0.0, 0.0]", "sharing.head=private")
    folder = four_sites.run("dex", *PRIVATE, *dex, "train.rounds=1")
    [line] = rounds(folder)
    assert sorted(line["sites"]) == ["alpha", "beta", "delta", "gamma"]
    for site in line["sites"]:
        _, entry = (json.loads(text) for text in ledger_lines(four_sites, site))
        assert [each["name"] for each in entry["mechanisms"]] == ["gradients"]
        [path] = (folder / "sites" / site).glob("runs/*/round-000001.state")
        moved = read_checked(path)
        assert b"experts" in moved
    shared = safetensors.numpy.load((folder / "model" / "model.safetensors").read_bytes())
    assert any(".director." in name for name in shared)
    assert not any(part in name for name in shared for part in (".experts.", ".router."))


def ledger_lines(federation, site):
    return (federation.sites / site / ".panfm" / "ledger" / FILE).read_text().splitlines()


@pytest.mark.slow
def test_a_run_without_a_guarantee_says_so_everywhere(federation, tmp_path):
    folder = federation.run(
        "broken",
        *PRIVATE,
        "objective.standardise=true",
        "patient-dp.acknowledge-broken-guarantee=true",
        "train.rounds=1",
    )
    label = "noise only, no DP claim"
    assert all(line["privacy"] == label for line in rounds(folder))
    for name in ("model/metadata.json", "sites.json"):
        assert json.loads((folder / name).read_text())["privacy"] == label
    assert all(json.loads(line)["claim"] == label for line in ledger_lines(federation, "alpha")[1:])
    shown = CliRunner().invoke(main, ["ledger", "show", str(federation.sites / "alpha")]).output
    assert label in shown
    assert "differentially private" not in shown
    found = read_run(folder)
    assert f"Privacy: {label}" in write_report(found).read_text()
    console = Console(file=io.StringIO(), width=100)
    print_tables(found, console)
    assert f"privacy: {label}" in console.file.getvalue()
    run_toml = (folder / "model" / "run.toml").read_text()
    assert "acknowledge-broken-guarantee = true" in run_toml
