"""Somebody at the site's disk makes its ledger say less than was spent; or a server voids it, or makes ledger and log
long or untrue."""

import hashlib
import json
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from panfm.cli import main
from panfm.config import load_site, parse_run
from panfm.errors import DataError, LedgerError, LimitError
from panfm.privacy import ledger as ledger_module
from panfm.privacy.guarantees import NO_CLAIM, claim
from panfm.privacy.ledger import ANCHOR, FILE, AnsweredRounds, Ledger, Limits
from panfm.privacy.statement import statement
from panfm.sharing.frames import Frame, Kind, encode
from panfm.sharing.messages import Invitation, Records
from panfm.site import Site
from panfm.site import answer as answer_of_site
from panfm.site.audit_log import AuditLog
from panfm.site.patient_budget import PatientBudget
from panfm.site.worker import Worker
from tests.unit.site.test_private_site import PRIVACY, RANDOM, RUN, task

LINES = 20_000
LIMITS = Limits(1e9, 1e-3)
PRIVATE = parse_run(RUN + RANDOM + PRIVACY)
FIRST = "0" * 64


@pytest.fixture
def composed(monkeypatch) -> list[int]:
    """How many mechanisms the accountant was asked to compose, each time. Every step costs 0.1."""
    asked = []

    def epsilon(mechanisms, delta):
        mechanisms = tuple(mechanisms)
        asked.append(len(mechanisms))
        return 0.1 * sum(each.count for each in mechanisms)

    monkeypatch.setattr(ledger_module, "epsilon", epsilon)
    return asked


@pytest.fixture
def folder(tmp_path, write_site) -> Path:
    return write_site(tmp_path / "alpha", "alpha", ("brain", "heart"))


def open_ledger(folder: Path) -> Ledger:
    return Ledger(folder / ".panfm" / "ledger", "alpha", anchor_dir=folder / ".panfm" / "state")


def spend(ledger: Ledger, times: int = 1) -> None:
    for number in range(times):
        ledger.spend(PRIVATE, "run-1", number + 1, limits=LIMITS, dataset="d")


def files(folder: Path) -> tuple[Path, Path]:
    return folder / ".panfm" / "ledger" / FILE, folder / ".panfm" / "state" / ANCHOR


def command(*words):
    done = CliRunner().invoke(main, ["ledger", *map(str, words)])
    return done.exit_code, done.output


def cut(path: Path, lines: int) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-lines]))


@pytest.mark.parametrize("is_running", [True, False])
@pytest.mark.parametrize("lines", [0, 1, 2])
def test_deleting_the_anchor_and_cutting_the_end_off_stops_the_site(folder, composed, is_running, lines):
    ledger = open_ledger(folder)
    spend(ledger, 3)
    path, anchor = files(folder)
    anchor.unlink()
    if lines:
        cut(path, lines)
    before = path.read_bytes()
    for ask in (spend, Ledger.entries, Ledger.spent):
        with pytest.raises(LedgerError, match=r"its anchor .*ledger\.anchor is missing"):
            ask(ledger if is_running else open_ledger(folder))
    assert path.read_bytes() == before
    assert command("verify", folder)[0] == command("show", folder)[0] == 1


def test_an_anchor_without_its_ledger_stops_the_site(folder, composed):
    spend(open_ledger(folder), 1)
    path, _ = files(folder)
    path.unlink()
    with pytest.raises(LedgerError, match="missing, foreign or cut off"):
        spend(open_ledger(folder))


def test_a_first_use_needs_neither_and_a_crash_during_it_stops_nothing(folder, composed, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("panfm.hash_chain.write_atomic", lambda path, content: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            spend(open_ledger(folder))
    path, anchor = files(folder)
    assert (len(path.read_bytes().splitlines()), anchor.exists()) == (1, False)
    spend(open_ledger(folder), 2)
    assert [entry["epsilon"] for entry in open_ledger(folder).entries()[1:]] == pytest.approx([0.2, 0.4])


def test_a_crash_between_ledger_and_anchor_stops_nothing(folder, composed):
    ledger = open_ledger(folder)
    spend(ledger, 1)
    _, anchor = files(folder)
    older = anchor.read_bytes()
    spend(ledger, 1)
    anchor.write_bytes(older)
    spend(ledger, 1)
    anchor.write_bytes(older)
    spend(open_ledger(folder), 1)
    assert len(open_ledger(folder).entries()) == 5


def test_who_cuts_both_files_is_found_by_an_end_that_was_noted(folder, composed):
    """A backup of both, put back: nothing on the disk tells, the operator's note does."""
    spend(open_ledger(folder), 2)
    shutil.copytree(folder / ".panfm", folder / "backup")
    spend(open_ledger(folder), 2)
    noted = command("verify", folder)[1].splitlines()[-1].removeprefix("The chain ends with: ")
    assert noted == open_ledger(folder).entries()[-1]["hash"]
    assert command("verify", folder, "--noted", noted)[0] == 0
    shutil.rmtree(folder / ".panfm")
    (folder / "backup").rename(folder / ".panfm")
    assert command("verify", folder)[0] == 0
    code, output = command("verify", folder, "--noted", noted)
    assert (code, "the end noted is not in it" in output) == (1, True)


def test_the_operator_vouches_for_a_ledger_whose_anchor_is_lost(folder, composed):
    spend(open_ledger(folder), 2)
    path, anchor = files(folder)
    middle, end = (entry["hash"] for entry in open_ledger(folder).entries()[1:])
    anchor.unlink()
    code, output = command("verify", folder, "--noted", "f" * 64)
    assert (code, "the end noted is not in it" in output, anchor.exists()) == (1, True, False)
    code, output = command("verify", folder, "--noted", middle)
    assert (code, "written anew" in output, anchor.read_text()) == (0, True, end)
    spend(open_ledger(folder), 1)
    assert len(open_ledger(folder).entries()) == 4
    cut(path, 1)
    assert command("verify", folder, "--noted", middle)[0] == 1  # an anchor that is there is not overruled


def bytes_read() -> int:
    """By this process so far, whatever function read them."""
    words = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(words["rchar"])


def long_ledger(folder: Path) -> Ledger:
    """A ledger of some 20,000 rounds, and its anchor."""
    spend(open_ledger(folder), 1)
    path, anchor = files(folder)
    opening, pattern = map(json.loads, path.read_text().splitlines())
    lines, before = [opening], opening["hash"]
    for number in range(LINES):
        entry = {**pattern, "round": number + 1, "epsilon": 0.2 * (number + 1), "before": before}
        del entry["hash"]
        before = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
        lines.append({**entry, "hash": before})
    path.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
    anchor.write_text(before)
    return open_ledger(folder)


@pytest.mark.slow
def test_a_long_ledger_costs_a_round_no_more_than_a_short_one(folder, composed):
    """The server asks for many rounds: each next one would have read and composed all before it."""
    ledger = long_ledger(folder)
    path, _ = files(folder)
    start = bytes_read()
    spend(ledger, 1)
    assert bytes_read() - start > path.stat().st_size * 0.9  # the first round verifies all of it
    start = bytes_read()
    for _ in range(5):
        spend(ledger, 1)
    assert bytes_read() - start < 5 * 8192 < path.stat().st_size / 50
    start = bytes_read()
    assert ledger.spent() == pytest.approx(0.2 * (LINES + 6))
    assert bytes_read() - start < 8192
    assert max(composed) <= 2
    assert len(ledger.entries()) == LINES + 7
    tampered = path.read_bytes().replace(b'"round": 7,', b'"round": 8,')
    time.sleep(0.02)  # a clock tick
    path.write_bytes(tampered)
    for ask in (spend, Ledger.entries, Ledger.spent):
        for each in (ledger, open_ledger(folder)):
            with pytest.raises(LedgerError, match="line 8 was changed"):
                ask(each)
    assert command("verify", folder)[0] == 1


def answer(number: int) -> Frame:
    return Frame(Kind.ANSWER, Records({"backbone": np.ones(3, np.float32)}, {}, {"run-id": "run-1", "round": number}))


@pytest.mark.slow
def test_a_long_record_of_departures_costs_a_message_no_more_than_a_short_one(tmp_path, caplog):
    record = AuditLog(tmp_path)
    record.append(answer(1), encode(answer(1)))
    pattern, lines, before = json.loads(record.path.read_text()), [], FIRST
    for number in range(LINES):
        line = {key: value for key, value in pattern.items() if key != "chain"} | {"round": number + 1}
        before = hashlib.sha256((before + json.dumps(line, sort_keys=True)).encode()).hexdigest()
        lines.append(json.dumps(line | {"chain": before}) + "\n")
    record.path.write_text("".join(lines))
    record.chain.write_anchor(before)
    record = AuditLog(tmp_path)
    record.append(answer(1), encode(answer(1)))
    start = bytes_read()
    for number in range(20):
        record.append(answer(number), encode(answer(number)))
    assert bytes_read() - start < 20 * 4096 < record.path.stat().st_size / 50
    assert len(list(record.lines())) == LINES + 21
    assert not caplog.records
    time.sleep(0.02)  # a clock tick
    record.path.write_bytes(record.path.read_bytes().replace(b'"round": 7,', b'"round": 8,'))
    for each in (record, AuditLog(tmp_path)):
        each.append(answer(1), encode(answer(1)))
        assert "line 7 was changed" in caplog.records[-1].getMessage()
        with pytest.raises(DataError, match="line 7 was changed"):
            list(each.lines())


def ask(site: Site, frame: Frame) -> dict:
    """Ask a site's worker; what its record says of the answer."""
    asking, listening = socket.socketpair()
    with asking, listening, ThreadPoolExecutor(1) as pool:
        sent = pool.submit(asking.sendall, encode(frame))
        worker = Worker(site.folder, listening)
        worker.site = site
        worker._recorded(answer_of_site(site, worker._receive(listening)))
        sent.result()
    return list(AuditLog(site.state_dir).lines())[-1]


def ask_rounds(folder: Path, numbers: range) -> list[dict]:
    site = Site(folder)
    return [ask(site, Frame(Kind.ROUND, task(number).to_records())) for number in numbers]


@pytest.fixture
def spent(folder, composed) -> list[str]:
    """The ends of the ledger after the opening and each of three rounds, all of which left the site."""
    assert [line["kind"] for line in ask_rounds(folder, range(1, 4))] == ["answer"] * 3
    return [entry["hash"] for entry in open_ledger(folder).entries()]


def test_an_old_end_that_was_noted_does_not_vouch_for_a_ledger_that_was_cut(folder, spent):
    path, anchor = files(folder)
    cut(path, 1)
    anchor.unlink()
    code, output = command("verify", folder, "--noted", spent[1])
    assert (code, "tells of 3 answered ones" in output, anchor.exists()) == (1, True, False)
    assert ask_rounds(folder, range(4, 5))[0]["kind"] == "error"


def test_deleting_ledger_and_anchor_does_not_give_the_budget_back(folder, spent):
    path, anchor = files(folder)
    path.unlink()
    anchor.unlink()
    assert ask_rounds(folder, range(4, 5))[0]["kind"] == "error"
    assert (path.exists(), anchor.exists()) == (False, False)
    assert command("verify", folder)[0] == command("show", folder)[0] == 1


def test_a_ledger_written_anew_with_cheaper_rounds_is_found_by_the_record(folder, spent, monkeypatch):
    path, anchor = files(folder)
    path.unlink()
    anchor.unlink()
    monkeypatch.setattr(ledger_module, "epsilon", lambda mechanisms, delta: 0.01)
    spend(open_ledger(folder), 3)
    assert command("verify", folder)[0] == 1


def test_a_record_that_was_tampered_with_does_not_hide_what_was_spent(folder, spent):
    record = AuditLog(folder / ".panfm" / "state").path
    record.write_bytes(record.read_bytes().replace(b'"round": 2', b'"round": 9'))
    code, output = command("verify", folder, "--noted", spent[-1])
    assert (code, "line 2 was changed" in output.replace("\n", " ")) == (1, True)


def test_a_round_that_was_paid_for_and_never_left_stops_nothing(folder, spent):
    budget = PatientBudget(folder, load_site(folder), folder / ".panfm" / "state")
    budget.pay(PRIVATE, task(4), "d")
    assert ask_rounds(folder, range(4, 6))[-1]["kind"] == "answer"
    assert len(open_ledger(folder).entries()) == 7


def test_server_cannot_void_the_ledger_of_a_site_with_floors(folder, composed):
    acknowledged = PRIVACY.replace("1.5", "1e-12") + "acknowledge-broken-guarantee = true\n"
    broken = parse_run(RUN + RANDOM + acknowledged)
    (folder / "site.toml").write_text('name = "alpha"\n[limits]\nsmallest-batch = 2\n')
    budget = PatientBudget(folder, load_site(folder), folder / ".panfm" / "state")
    with pytest.raises(LimitError, match="noise but makes no claim"):
        budget.pay(broken, task(), "d")
    assert budget.ledger.entries() == []


def test_a_voided_ledger_names_nobody_as_protected(folder, composed):
    acknowledged = PRIVACY.replace("1.5", "1e-12") + "acknowledge-broken-guarantee = true\n"
    ledger = open_ledger(folder)
    ledger.spend(parse_run(RUN + RANDOM + acknowledged), "run-1", 1, limits=LIMITS, dataset="d")
    lines = statement(ledger.entries())
    assert "Nothing is promised" in lines[-1]
    assert not any("Protected against" in line for line in lines)


def test_the_record_labels_a_message_by_its_own_question_not_by_the_run_before(folder):
    site = Site(folder)
    private = ask(site, Frame(Kind.HANDSHAKE, Invitation(task().run_toml).to_records()))
    assert private["privacy"].startswith("(9, 0.001)-DP")
    unheld = RUN.replace("brain-mr =", "eye-mr =").replace("heart-mr =", "lung-mr =")
    for run_toml in (unheld, "x"):
        line = ask(site, Frame(Kind.HANDSHAKE, Records(config={"run": run_toml})))
        assert (line["kind"], line["privacy"], line["epsilon"]) == ("error", "none", None)
    line = ask(site, Frame(Kind.ANSWER, Records()))
    assert (line["kind"], line["privacy"], line["epsilon"]) == ("error", "none", None)


def test_a_ledger_that_is_changed_while_it_is_verified_is_not_taken_for_verified(folder, composed):
    """Somebody makes an entry cheaper after it was read, while the audit log is read."""
    spend(open_ledger(folder), 3)
    path, _ = files(folder)

    def answered():
        path.write_bytes(path.read_bytes().replace(b'"noise": 1', b'"noise": 9', 1))
        return AnsweredRounds()

    ledger = Ledger(path.parent, "alpha", anchor_dir=folder / ".panfm" / "state", answered=answered)
    ledger.spent()
    with pytest.raises(LedgerError, match="line 2 was changed"):
        spend(ledger)


def test_a_round_that_can_claim_nothing_is_not_booked(folder, composed):
    """A run whose promise is broken reaches the ledger past every door."""
    broken = PRIVATE.model_copy(update={"train": PRIVATE.train.model_copy(update={"proximal_mu": 1.0})})
    assert claim(broken) == NO_CLAIM
    with pytest.raises(LedgerError, match="claims nothing"):
        open_ledger(folder).spend(broken, "run-1", 1, limits=LIMITS, dataset="d")
    assert not files(folder)[0].exists()
