"""A private federation: each site stops at its own budget, and the run goes on with the others."""

import json

import pytest

from panfm.errors import RunError
from panfm.privacy import ledger
from panfm.privacy.ledger import FILE

PRIVATE = (
    "objective.standardise=false",
    "masking.policy=random",
    "federation.min-sites=1",
    "privacy.epsilon=10.0",
    "privacy.delta=1e-3",
    "privacy.public-subjects=50",
    "privacy.noise-multiplier=1.0",
    "privacy.sample-rate=0.5",
)
BUDGETS = {"alpha": 0.5, "beta": 0.3, "delta": 0.7}
"""A step costs 0.1 and a round has two; gamma has the run's budget."""


@pytest.fixture
def four_sites(federation, write_site, monkeypatch):
    monkeypatch.setattr(ledger, "epsilon", lambda mechanisms, delta: 0.1 * sum(each.count for each in mechanisms))
    write_site(federation.sites / "delta", "delta", ("brain", "heart"))
    for name, epsilon in BUDGETS.items():
        with (federation.sites / name / "site.toml").open("a") as file:
            file.write(f"[limits]\nepsilon = {epsilon}\n")
    return federation


def spent(federation, site):
    lines = (federation.sites / site / ".panfm" / "ledger" / FILE).read_text().splitlines()
    return [json.loads(line)["epsilon"] for line in lines[1:]]


def rounds(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


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
    assert spent(four_sites, "gamma") == pytest.approx([0.2, 0.4, 0.6])
    second = four_sites.run("second", *PRIVATE, "train.rounds=1")
    assert list(rounds(second)[0]["sites"]) == ["gamma"]
    assert spent(four_sites, "gamma") == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_a_run_ends_when_too_few_sites_can_pay(four_sites):
    with pytest.raises(RunError, match="BudgetError"):
        four_sites.run("first", *PRIVATE, "federation.min-sites=4")


def test_a_run_without_a_guarantee_says_so(federation):
    folder = federation.run(
        "broken", *PRIVATE, "objective.standardise=true", "privacy.acknowledge-broken-guarantee=true", "train.rounds=1"
    )
    metadata = json.loads((folder / "model" / "metadata.json").read_text())
    assert metadata["privacy"] == "noise only, no DP claim"
    ledger_line = (federation.sites / "alpha" / ".panfm" / "ledger" / FILE).read_text().splitlines()[-1]
    assert json.loads(ledger_line)["claim"] == "noise only, no DP claim"
