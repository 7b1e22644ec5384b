"""The ledger: written first, shared by all runs, and no change of it goes unseen."""

import json
import multiprocessing

import pytest

from panfm.errors import BudgetError, LedgerError
from panfm.privacy import ledger as module
from panfm.privacy.ledger import ANCHOR, FILE, Ledger, Limits

LIMITS = Limits(1000.0, 1e-3)


@pytest.fixture
def cheap(monkeypatch):
    """Every step costs 0.1, whatever its noise: the accountant has its own tests."""

    def epsilon(mechanisms, delta):
        return 0.1 * sum(each.count for each in mechanisms)

    monkeypatch.setattr(module, "epsilon", epsilon)


def spend(ledger, run, times=1, *, run_id="run-1", limits=LIMITS):
    return [ledger.spend(run, run_id, number + 1, limits=limits, dataset="d") for number in range(times)][-1]


def test_a_round_is_on_disk_before_it_runs(make_private, tmp_path, cheap):
    run = make_private()
    permit = spend(Ledger(tmp_path, "alpha"), run)
    opened, entry = (json.loads(line) for line in (tmp_path / FILE).read_text().splitlines())
    assert (opened["kind"], opened["site"], opened["unit"]) == ("opened", "alpha", "patient")
    assert (entry["run"], entry["round"], entry["epsilon"], entry["limit"]) == ("run-1", 1, 0.4, 1000.0)
    assert entry["mechanisms"][0]["releases"] == ["updates"]
    assert module.mechanisms_of(entry) == list(permit.mechanisms)


def test_the_entry_is_synced_before_leave_is_given(make_private, tmp_path, cheap, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        spend(Ledger(tmp_path, "alpha"), make_private())


def test_the_budget_is_asked_before_and_refusal_writes_nothing(make_private, tmp_path, cheap):
    ledger = Ledger(tmp_path, "alpha")
    run = make_private()
    spend(ledger, run, 2, limits=Limits(0.8, 1e-3))
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(BudgetError, match=r"would reach epsilon 1\.200 of 0\.8 at delta 0\.001, spent 0\.800"):
        spend(ledger, run, limits=Limits(0.8, 1e-3))
    assert (tmp_path / FILE).read_bytes() == before


def test_two_runs_and_a_restart_share_one_ledger(make_private, tmp_path, cheap):
    run = make_private()
    spend(Ledger(tmp_path, "alpha"), run, run_id="first")
    spend(Ledger(tmp_path, "alpha"), run, run_id="second")
    spent = [entry["epsilon"] for entry in Ledger(tmp_path, "alpha").entries()[1:]]
    assert spent == pytest.approx([0.4, 0.8])
    with pytest.raises(BudgetError):
        spend(Ledger(tmp_path, "alpha"), run, run_id="third", limits=Limits(1.0, 1e-3))


def test_a_line_cut_short_by_a_crash_is_left_out(make_private, tmp_path, cheap):
    """Its round never ran: leave is given after the whole line is on disk."""
    run = make_private()
    spend(Ledger(tmp_path, "alpha"), run, 2)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole + b'{"kind": "rou')
    assert len(Ledger(tmp_path, "alpha").entries()) == 3
    spend(Ledger(tmp_path, "alpha"), run)
    assert (tmp_path / FILE).read_bytes().startswith(whole + b'{"before"')
    assert Ledger(tmp_path, "alpha").entries()[-1]["epsilon"] == pytest.approx(1.2)


def tampered(lines):
    """Ways to lie about what was spent."""
    changed = lines[2].replace(b'"noise": 1.0', b'"noise": 9.0')
    entry = json.loads(lines[2])
    spaced = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
    return {
        "changed": [lines[0], lines[1], changed, lines[3]],
        "removed": [lines[0], lines[1], lines[3]],
        "moved": [lines[0], lines[2], lines[1], lines[3]],
        "opening removed": lines[1:],
        "twice": [*lines, lines[3]],
        "other bytes": [lines[0], lines[1], spaced, lines[3]],
        "no entry": [lines[0], b"[]", *lines[1:]],
        "not text": [b"\xff\xfe", *lines],
        "cut off": lines[:3],
        "emptied": [],
    }


@pytest.mark.parametrize("kind", list(tampered([b'{"noise": 1}'] * 4)))
def test_a_ledger_that_was_changed_stops_the_next_round(make_private, tmp_path, cheap, kind):
    run = make_private()
    ledger = Ledger(tmp_path, "alpha", anchor_dir=tmp_path / "state")
    spend(ledger, run, 3)
    lines = (tmp_path / FILE).read_bytes().splitlines()
    (tmp_path / FILE).write_bytes(b"".join(line + b"\n" for line in tampered(lines)[kind]))
    with pytest.raises(LedgerError, match=str(FILE)):
        spend(ledger, run)
    with pytest.raises(LedgerError):
        ledger.entries()


def test_missing_and_foreign_ledgers_are_refused(make_private, tmp_path, cheap):
    run = make_private()
    spend(Ledger(tmp_path / "a", "alpha", anchor_dir=tmp_path / "state"), run)
    assert (tmp_path / "state" / ANCHOR).exists()
    with pytest.raises(LedgerError, match="missing, foreign or cut off"):
        spend(Ledger(tmp_path / "elsewhere", "alpha", anchor_dir=tmp_path / "state"), run)
    with pytest.raises(LedgerError, match="belongs to site alpha, expected beta"):
        spend(Ledger(tmp_path / "a", "beta"), run)


def test_a_ledger_of_patients_is_none_of_sites(make_private, tmp_path, cheap):
    spend(Ledger(tmp_path, "alpha"), make_private())
    with pytest.raises(LedgerError, match="is kept per patient, expected per site"):
        Ledger(tmp_path, "alpha", unit="site").entries()


def test_a_round_without_a_claim_is_labelled_and_ends_all_claims(make_private, tmp_path, cheap):
    broken = make_private('[objective]\nname = "dino"\n', more="acknowledge-broken-guarantee = true")
    assert spend(Ledger(tmp_path, "alpha"), broken, limits=Limits(0.1, 1e-3)).claim == "noise only, no DP claim"
    assert Ledger(tmp_path, "alpha").entries()[-1]["claim"] == "noise only, no DP claim"
    with pytest.raises(BudgetError, match="noise only, no DP claim"):
        spend(Ledger(tmp_path, "alpha"), make_private())


def test_who_only_reads_leaves_nothing_behind(make_private, tmp_path, cheap):
    ledger = Ledger(tmp_path / "ledger", "alpha", anchor_dir=tmp_path / "state")
    assert ledger.entries() == []
    assert not list(tmp_path.iterdir())
    spend(ledger, make_private())
    (tmp_path / "state" / ANCHOR).write_bytes(b"\xff\xfe")
    with pytest.raises(LedgerError, match="missing, foreign or cut off"):
        ledger.entries()
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match=r"cannot be read \(Not a directory\)"):
        Ledger(tmp_path / "file", "alpha").entries()


def _spend_some(folder, run):
    for number in range(5):
        Ledger(folder, "alpha").spend(run, "run-1", number + 1, limits=Limits(1e6, 1e-3), dataset="d")


@pytest.mark.slow
def test_processes_take_turns(make_private, tmp_path):
    run = make_private()
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_spend_some, args=(tmp_path, run)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    entries = Ledger(tmp_path, "alpha").entries()
    spent = [entry["epsilon"] for entry in entries[1:]]
    assert len(spent) == 10
    assert spent == sorted(spent)
