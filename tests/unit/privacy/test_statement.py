"""The ledger in words, and the commands that print it."""

import pytest
from typer.testing import CliRunner

from panfm.cli import main
from panfm.config import dump_toml
from panfm.privacy.ledger import FILE, Ledger, Limits
from panfm.privacy.mechanisms import epsilon, planned
from panfm.privacy.statement import statement


def run_ledger(*words):
    return CliRunner().invoke(main, ["ledger", *words])


@pytest.fixture
def site(tmp_path, write_site, make_private):
    folder = write_site(tmp_path / "alpha", "alpha", ("brain",))
    ledger = Ledger(folder / ".panfm" / "ledger", "alpha", anchor_dir=folder / ".panfm" / "state")
    ledger.spend(make_private(), "run-1", 1, limits=Limits(8.0, 1e-3), dataset="d")
    return folder


def test_what_a_ledger_says(site):
    shown = run_ledger("show", str(site)).output
    assert "Site alpha: 1 private rounds in 1 runs." in shown
    assert "For every patient whose records are at ONE site, all that alpha sent" in shown
    assert "of 8 at delta 0.001. A patient at two such sites: epsilon" in shown
    assert (
        "gradients (releases updates): 4 times, sensitivity 0.5, noise 1 x that, each patient in it with chance 0.25"
        in (shown.replace("\n", " "))
    )
    assert "Not covered:" in shown
    assert "Protected against: the coordinator and its server, even one that chooses" in shown
    assert "Void if the same patients also took part in a run without privacy" in shown
    end = Ledger(site / ".panfm" / "ledger", "alpha").entries()[-1]["hash"]
    assert shown.splitlines()[-1] == f"The chain ends with: {end}"


def test_a_patient_at_several_sites_pays_at_each(site, make_private):
    shown = " ".join(run_ledger("show", str(site)).output.split())
    [mechanism] = planned(make_private())
    costs = [epsilon([mechanism] * sites, 1e-3) for sites in (1, 2, 3)]
    assert len({f"{cost:.3f}" for cost in costs}) == 3
    assert f"({costs[0]:.3f}, 0.001)-differentially private" in shown
    assert f"A patient at two such sites: epsilon {costs[1]:.3f}; at three: {costs[2]:.3f}." in shown


def test_a_run_folder_has_a_ledger_only_if_its_server_adds_noise(make_private, tmp_path):
    (tmp_path / "run.toml").write_text(dump_toml(make_private()))
    for words in (["show", tmp_path], ["verify", tmp_path], ["plan", tmp_path / "run.toml", "--site", tmp_path]):
        done = run_ledger(*map(str, words))
        assert done.exit_code == 1
        assert done.stderr == (f"{tmp_path}: a run without site-dp has no ledger, its sites do; name a site folder\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


@pytest.mark.parametrize("unit", ["patient", "site"])
def test_a_ledger_that_was_opened_and_no_more(unit):
    assert statement([{"kind": "opened", "unit": unit}]) == ["No private round has run: nothing is spent."]


def test_nothing_spent_and_nothing_promised(make_private, tmp_path):
    assert statement([]) == ["No private round has run: nothing is spent."]
    broken = make_private('[objective]\nname = "dino"\n', more="acknowledge-broken-guarantee = true")
    ledger = Ledger(tmp_path, "alpha")
    ledger.spend(broken, "run-1", 1, limits=Limits(8.0, 1e-3), dataset="d")
    shown = " ".join(statement(ledger.entries()))
    assert "noise only, no DP claim" in shown
    assert "differentially private" not in shown
    assert "Protected against" not in shown


def test_verify_finds_a_change(site):
    assert "2 entries, each follows from the one before" in run_ledger("verify", str(site)).output.replace("\n", " ")
    path = site / ".panfm" / "ledger" / FILE
    path.write_text(path.read_text().replace('"noise": 1.0', '"noise": 2.0'))
    done = run_ledger("verify", str(site))
    assert done.exit_code == 1
    assert "line 2 was changed" in done.output


@pytest.mark.slow
def test_plan_goes_both_ways(tmp_path, make_private):
    path = tmp_path / "run.toml"
    path.write_text(dump_toml(make_private()))
    done = run_ledger("plan", str(path), "--set", "patient-dp.epsilon=2.0")
    first, cost, noise = done.output.splitlines()
    assert first.startswith("per patient: 2 rounds x 4 steps, sample-rate 0.25")
    wanted = noise.split("noise-multiplier ")[1]
    again = run_ledger("plan", str(path), "--set", f"patient-dp.noise-multiplier={float(wanted) * 1.001}")
    found = float(again.output.splitlines()[1].split("epsilon ")[1])
    assert 1.95 < found <= 2.0
    assert float(cost.split("epsilon ")[1]) > 2.0
    missing = tmp_path / "plain.toml"
    missing.write_text(dump_toml(make_private().model_copy(update={"patient_dp": None})))
    assert "patient-dp is missing" in run_ledger("plan", str(missing)).output
