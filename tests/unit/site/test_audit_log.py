"""What left is written down first, and no line of it can be changed unseen."""

import hashlib
import json

import numpy as np
import pytest

from panfm.cli.site_lines import accept_audit_log
from panfm.errors import DataError
from panfm.hash_chain import FIRST_HASH, sealed
from panfm.privacy.ledger import AnsweredRounds
from panfm.sharing.frames import Frame, Kind, encode
from panfm.sharing.messages import Records
from panfm.site.audit_log import AuditLog


def reply(number: int) -> Frame:
    arrays = {"backbone": np.ones(3, np.float32), "head": np.ones(2, np.int8)}
    return Frame(Kind.ANSWER, Records(arrays, {"loss": 0.5}, {"run-id": "run-1", "round": number}))


@pytest.fixture
def audit_log(tmp_path):
    audit_log = AuditLog(tmp_path / "state")
    for number in (1, 2, 3):
        audit_log.append(reply(number), encode(reply(number)))
    return audit_log


def test_what_is_written(audit_log):
    first, *_, last = audit_log.lines()
    assert first["arrays"] == [["backbone", "float32", 3], ["head", "int8", 2]]
    assert (first["numbers"], first["words"], last["round"]) == (["loss"], ["round", "run-id"], 3)
    assert first["sha256"] == hashlib.sha256(encode(reply(1))).hexdigest()
    assert first["bytes"] == len(encode(reply(1)))


def test_errors_are_messages_too(audit_log):
    frame = Frame.error("site alpha: no")
    audit_log.append(frame, encode(frame))
    assert [line["kind"] for line in audit_log.lines()] == ["answer"] * 3 + ["error"]


def test_answers_of_private_rounds_are_counted_and_nothing_else(audit_log):
    """Rounds without privacy, handshakes and errors of a private run are none; epsilon is the newest one told."""
    handshake, error = Frame(Kind.ANSWER, Records(config={"site": "alpha"})), Frame.error("site alpha: no")
    for frame, epsilon in ((handshake, None), (reply(1), 0.5), (error, 0.5), (reply(2), 0.7), (handshake, 0.7)):
        audit_log.append(frame, encode(frame), privacy="(8, 0.001)-DP", epsilon=epsilon)
    assert audit_log.private_rounds() == AnsweredRounds(2, 0.7)


def test_nothing_yet(tmp_path):
    assert list(AuditLog(tmp_path / "state").lines()) == []


def change(lines: list[str]) -> list[str]:
    return [lines[0].replace('"round": 1', '"round": 9'), *lines[1:]]


@pytest.mark.parametrize(
    ("tamper", "number"),
    [
        (change, 1),
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[0], lines[2]], 2),
        (lambda lines: [lines[0], lines[2], lines[1]], 2),
        (lambda lines: [lines[0], "{}", *lines[1:]], 2),
        (lambda lines: [lines[0], "[]", *lines[1:]], 2),
        (lambda lines: [*lines, "no json"], 4),
    ],
)
def test_tampering_is_seen(audit_log, tamper, number):
    lines = tamper(audit_log.path.read_text().splitlines())
    audit_log.path.write_text("\n".join(lines) + "\n")
    for _ in range(2):
        with pytest.raises(DataError, match=f"line {number} "):
            list(audit_log.lines())
        audit_log.append(reply(4), encode(reply(4)))  # work goes on


@pytest.mark.parametrize("is_new_process", [False, True])
@pytest.mark.parametrize(
    "cut",
    [
        lambda log: log.path.write_bytes(b"".join(log.path.read_bytes().splitlines(True)[:-1])),
        lambda log: log.path.write_bytes(b""),
        lambda log: log.path.unlink(),
        lambda log: log.path.with_name("departures.anchor").unlink(),
        lambda log: log.path.with_name("departures.anchor").write_text("0" * 64),
    ],
)
def test_a_log_that_was_cut_off_or_removed_is_seen_before_the_next_message(audit_log, cut, is_new_process):
    cut(audit_log)
    again = AuditLog(audit_log.path.parent) if is_new_process else audit_log
    for _ in range(2):
        with pytest.raises(DataError, match=r"cut off or removed.* --accept"):
            list(again.lines())
        with pytest.raises(DataError, match=r"cut off or removed.* --accept"):
            again.append(reply(4), encode(reply(4)))
    left = len(again.path.read_bytes().splitlines()) if again.path.exists() else 0
    accept_audit_log(again.path.parent)
    assert len(list(again.lines())) == left
    again.append(reply(4), encode(reply(4)))
    assert len(list(again.lines())) == left + 1


@pytest.mark.parametrize("before", [0, 1, 2, 5])
def test_a_full_disk_keeps_messages_and_wedges_nothing(tmp_path, monkeypatch, before):
    audit_log = AuditLog(tmp_path)
    for number in range(before):
        audit_log.append(reply(number), encode(reply(number)))
    with monkeypatch.context() as full:
        full.setattr("panfm.hash_chain.write_atomic", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
        for _ in range(4):
            with pytest.raises(OSError, match="disk full"):
                audit_log.append(reply(before), encode(reply(before)))
    list(AuditLog(tmp_path).lines())
    for log in (audit_log, AuditLog(tmp_path)):
        log.append(reply(before), encode(reply(before)))
        list(log.lines())


def test_a_log_of_an_older_version_gets_an_anchor_with_its_next_message(audit_log, caplog):
    anchor = audit_log.path.with_name("departures.anchor")
    entries = [dict(entry) for entry in audit_log.lines()]
    before, old = FIRST_HASH, b""
    for entry in entries:
        content = {key: value for key, value in entry.items() if key not in ("chain", "anchored")}
        old += (line := sealed(content, before))
        before = json.loads(line)["chain"]
    audit_log.path.write_bytes(old)
    anchor.unlink()
    again = AuditLog(audit_log.path.parent)
    assert len(list(again.lines())) == 3
    again.append(reply(4), encode(reply(4)))
    assert "gets an anchor" in caplog.text
    assert anchor.read_text() == list(again.lines())[-1]["chain"]


def test_the_rest_of_a_crash_goes_with_the_next_message(audit_log):
    with audit_log.path.open("a") as file:
        file.write(json.dumps({"time": "cut o"})[:-3])
    assert len(list(audit_log.lines())) == 3
    audit_log.append(reply(4), encode(reply(4)))
    assert [line["round"] for line in audit_log.lines()] == [1, 2, 3, 4]


def test_a_new_process_goes_on_where_the_last_one_stopped(audit_log):
    again = AuditLog(audit_log.path.parent)
    again.append(reply(4), encode(reply(4)))
    assert len(list(again.lines())) == 4
