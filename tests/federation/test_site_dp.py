"""A federation with site-level privacy: the server's ledger, its budget, and a run folder without raw numbers."""

import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from panfm.cli import main
from panfm.errors import BudgetError, RunError
from panfm.privacy import ledger as module
from panfm.privacy.ledger import FILE
from panfm.report.report_page import write_report
from panfm.report.run_files import read_run
from server.run_folder import RunFolder
from simulations.engines.job import Job
from simulations.engines.local import run as run_local

PRIVATE = (
    "site-dp.epsilon=3.0",
    "site-dp.delta=1e-2",
    "site-dp.num-sites=3",
    "federation.min-sites=3",
    "site-dp.noise-multiplier=5.0",
    "site-dp.clip-norm=0.1",
    "train.rounds=2",
    "train.validate-every=1",
)


@pytest.fixture
def cheap(monkeypatch):
    """A round costs 0.4: the accountant has its own tests."""
    monkeypatch.setattr(module, "epsilon", lambda mechanisms, delta: 0.4 * sum(each.count for each in mechanisms))


def rounds(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def ledger(folder):
    return [json.loads(line) for line in (folder / "ledger" / FILE).read_text().splitlines()]


def test_a_run_tells_nothing_raw_of_its_sites(federation):
    folder = federation.run("first", *PRIVATE)
    label = "(3, 0.01)-DP per site, zero-out, server trusted"
    for line in rounds(folder):
        assert line["privacy"] == label
        assert (line["loss"], line["profile"]) == (None, None)
        for site in line["sites"].values():
            assert set(site) == {"seconds", "state_round", "loss", "validation_loss", "num_skipped", "saliency",
                                 "monitors", "weights", "shares", "norms", "bytes_down", "bytes_up"}  # fmt: skip
            assert (site["loss"], site["validation_loss"], site["num_skipped"]) == (None, None, None)
            assert (site["saliency"], site["monitors"], site["norms"]) == ({}, {}, {})
            assert all(weights == [1.0] for weights in site["weights"].values())
            assert all(round(1 / share, 3) in (1, 2, 3) for share in site["shares"].values())  # equal ones
    sites = json.loads((folder / "sites.json").read_text())
    assert {found["subjects"] for found in sites["sites"].values()} == {None}
    assert sites["coverage"]["liver-mr"] == {"gamma": None}
    assert json.loads((folder / "model" / "metadata.json").read_text())["privacy"] == label
    opened, *entries = ledger(folder)
    assert (opened["unit"], opened["relation"]) == ("site", "zero-out")
    assert [entry["round"] for entry in entries] == [1, 2]
    assert entries[0]["epsilon"] < entries[1]["epsilon"] <= 3.0
    assert (
        entries[0]["mechanisms"][0] | {"noise": 5.0, "sensitivity": 0.1, "rate": 1.0, "count": 1}
        == (entries[0]["mechanisms"][0])
    )
    shown = CliRunner().invoke(main, ["ledger", "show", str(folder)]).output
    assert "differentially private under replacing all of the site's updates by zero" in " ".join(shown.split())
    assert "against the server" in shown
    page = write_report(read_run(folder)).read_text()
    assert f"Privacy: {label}" in page
    assert re.search(r">some</td>", page)


def test_a_budget_that_does_not_cover_the_rounds_stops_the_run_before_the_first(federation, cheap):
    with pytest.raises(BudgetError, match=r"2 rounds would reach epsilon 0\.800 of 0\.5 at delta 0\.01, spent 0\.000"):
        federation.run("first", *PRIVATE, "site-dp.epsilon=0.5")
    assert not rounds(federation.folder / "first")


def test_a_site_that_fails_ends_the_round_and_nothing_is_released(federation):
    shutil.rmtree(federation.sites / "beta")
    job = federation.job("first", *PRIVATE)
    with pytest.raises(RunError, match=r"2 sites, expected 3|2 of at least 3"):
        run_local(job)
    assert not (job.run_dir / "model").exists()


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_ledger(federation, cheap, monkeypatch):
    """Killed between paying and the checkpoint: the round is paid for twice."""

    def killed(self, state):
        if state.round_number == 1:
            raise KeyboardInterrupt
        return save(self, state)

    save = RunFolder.save_state
    monkeypatch.setattr(RunFolder, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        federation.run("first", *PRIVATE)
    monkeypatch.setattr(RunFolder, "save_state", save)
    folder = federation.folder / "first"
    before = ledger(folder)[-1]["epsilon"]
    RunFolder.resume(folder)
    run_local(Job(federation.sites, folder))
    assert [entry["round"] for entry in ledger(folder)[1:]] == [1, 1, 2]
    spent = [entry["epsilon"] for entry in ledger(folder)[1:]]
    assert before == spent[0]
    assert spent == sorted(set(spent))
    assert [line["round"] for line in rounds(folder)] == [1, 2]
