import errno
import json
from datetime import datetime, timedelta

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from panfm.errors import DataError, PanfmError, RunError
from panfm.report.run_events import EventKind, read_events
from server.app import app
from server.checkpoint import ServerState
from server.events import EventLog
from server.run_folder import RunFolder


def line(number, *, sites=(), rejected=None, away=None, moved=None):
    return {
        "round": number,
        "sites": {site: {} for site in sites},
        "rejected": rejected or {},
        "away": away or {},
        "moved": moved or {},
    }


def _fail(folder, error):
    with folder.at_work():
        folder.events.begin("run", 0)
        folder.save_state(ServerState("run", 0, {"backbone": np.zeros(1, np.float32)}))
        raise error


def told(folder):
    return [(event.kind.value, event.round, event.site) for event in read_events(folder)]


def test_one_line_of_an_event(tmp_path):
    log = EventLog(tmp_path)
    log.begin("run-1", 0)
    log.note(EventKind.WAITING, "1 of 2\nsites", round_number=3, sites=["a"])
    first, second = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert datetime.fromisoformat(first["time"]).utcoffset() == timedelta(0)
    assert (first["run"], first["round"], first["kind"], first["site"]) == ("run-1", 0, "started", None)
    del second["time"]
    expected = {"run": "run-1", "round": 3, "kind": "waiting", "site": None}
    assert second == expected | {"words": "1 of 2 sites", "details": {"sites": ["a"]}}


def test_a_state_is_noted_when_it_begins_and_when_it_is_over(tmp_path):
    log = EventLog(tmp_path)
    log.begin("run", 0)
    for number in range(1, 11):
        log.note_round(line(number, sites=["a"], rejected={"b": f"late for the {number}. time"}))
    log.note_round(line(11, sites=["a"], away={"b": "offline", "node 7": "cannot join"}))
    log.note_round(line(12, sites=["a"], away={"b": "offline", "node 7": "cannot join"}))
    log.note_round(line(13, sites=["a", "b"], moved={"a": "moved from node 1 to node 2"}))
    log.note_round(line(14, sites=["a", "b"]))
    assert told(tmp_path) == [
        ("started", 0, None),
        ("left-out", 1, "b"),
        ("away", 11, "node 7"),
        ("moved", 13, "a"),
        ("back", 13, "b"),
        ("back", 13, "node 7"),
    ]


def test_a_worker_that_was_lost_is_told_each_time(tmp_path):
    log = EventLog(tmp_path)
    for number in (1, 2):
        log.note_round(line(number, sites=["a"]) | {"worker_lost": ["a"]})
    assert told(tmp_path) == [("worker-lost", 1, "a"), ("worker-lost", 2, "a")]


def test_a_site_that_is_back_and_refuses_is_told_anew(tmp_path):
    log = EventLog(tmp_path)
    log.note_round(line(1, away={"a": "offline"}))
    log.note_round(line(2, rejected={"a": "no"}))
    log.note_round(line(3, away={"a": "offline"}))
    assert told(tmp_path) == [("away", 1, "a"), ("left-out", 2, "a")]


def test_states_last_over_a_resume(tmp_path):
    log = EventLog(tmp_path)
    log.begin("run", 0)
    log.note_round(line(1, rejected={"b": "no reply within 5 s"}))
    log.note(EventKind.WAITING, "1 of 2 sites")
    log.note_level(EventKind.DISK, "low", "1 GiB free", of="/data")
    log.note(EventKind.FAILED, "the disk is full")
    for _ in range(2):
        log = EventLog(tmp_path)
        log.begin("run", 1)
        log.note(EventKind.WAITING, "still")
        log.note_level(EventKind.DISK, "low", "still", of="/data")
        log.note_round(line(2, rejected={"b": "no reply within 6 s"}))
        log.note(EventKind.STOPPED, "by the coordinator")
    log.note(EventKind.QUORUM, "2 of 2 sites")
    log.note(EventKind.QUORUM, "2 of 2 sites")
    log.note_level(EventKind.DISK, None, "90 GiB free", of="/data")
    kinds = [kind for kind, _, _ in told(tmp_path)]
    again = ["resumed", "stopped"]
    assert kinds == ["started", "left-out", "waiting", "disk", "failed", *again, *again, "quorum", "disk"]


def test_a_killed_server_is_noted_at_the_resume(tmp_path):
    EventLog(tmp_path).begin("run", 0)
    EventLog(tmp_path).begin("run", 4)
    assert told(tmp_path) == [("started", 0, None), ("failed", 4, None), ("resumed", 4, None)]


def test_a_last_line_that_a_crash_cut_is_no_event(tmp_path):
    EventLog(tmp_path).begin("run", 0)
    path = tmp_path / "events.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    assert told(tmp_path) == [("started", 0, None)]
    EventLog(tmp_path).note(EventKind.STOPPED, "by the coordinator")
    assert told(tmp_path) == [("started", 0, None), ("stopped", 0, None)]
    assert path.read_bytes().startswith(whole)
    path.write_bytes(whole + b'{"kind": "rained"}\n')
    with pytest.raises(DataError, match=r"events\.jsonl:2"):
        EventLog(tmp_path)


def test_what_a_full_disk_did_not_take_is_written_later(tmp_path, monkeypatch, caplog):
    log = EventLog(tmp_path)
    log.begin("run", 0)
    with monkeypatch.context() as full:
        full.setattr("server.events.sync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk full")))
        log.note(EventKind.WAITING, "1 of 2 sites")
    assert "events.jsonl: cannot be written (disk full)" in caplog.text
    assert told(tmp_path) == [("started", 0, None)]
    log.note(EventKind.QUORUM, "2 of 2 sites")
    assert [kind for kind, _, _ in told(tmp_path)] == ["started", "waiting", "quorum"]


def test_the_end_that_a_full_disk_did_not_take_is_noted_at_the_resume(tmp_path, make_run, monkeypatch):
    folder = RunFolder.create(tmp_path, make_run())
    with folder.at_work():
        folder.events.begin("run", 0)
    with monkeypatch.context() as full:
        full.setattr("server.events.append_lines", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        folder.note_end("round 3: the disk is full")
    again = RunFolder(tmp_path, folder.run)
    with again.at_work():
        again.events.begin("run", 2)
    events = read_events(tmp_path)
    assert [event.kind.value for event in events] == ["started", "failed", "resumed"]
    assert (events[1].words, events[1].details) == ("round 3: the disk is full", {"noticed": "at resume"})


def test_failures_and_resumes_of_a_run_stay_in_its_history(tmp_path, make_run):
    folder = RunFolder.create(tmp_path, make_run())
    for error in (RunError("round 1: 1 good replies"), ValueError("secret")):
        with pytest.raises(type(error)):
            _fail(folder, error)
        folder = RunFolder.resume(tmp_path)
    events = read_events(tmp_path)
    assert [event.kind.value for event in events] == ["started", "failed", "resumed", "failed"]
    assert events[1].words == "round 1: 1 good replies"
    assert "secret" not in events[3].words


def test_a_site_that_is_left_out_for_another_reason_is_told_of_anew(tmp_path):
    """Numbers aside: norms and rounds differ each time; also over a resume."""
    log = EventLog(tmp_path)
    log.begin("run", 0)
    for words in ("norm 3.21 is above 2", "norm 4.5 is above 2", "BudgetError: no", "BudgetError: no"):
        log = EventLog(tmp_path)
        log.note(EventKind.LEFT_OUT, words, site="alpha")
    assert [event.words for event in read_events(tmp_path)[1:]] == ["norm 3.21 is above 2", "BudgetError: no"]


@pytest.mark.parametrize("fault", ["run.toml", "alerts.toml", "events.jsonl"])
def test_a_fault_before_the_work_begins_is_written_down(tmp_path, make_run, fault):
    """So that `keep` gives up and says why, and alerts tell of it."""
    folder = RunFolder.create(tmp_path / "run", make_run())
    (folder.path / fault).write_text("no = [\n{}\n")
    with pytest.raises(PanfmError):
        app(None, Context(1, 1, {}, RecordDict(), {"resume": str(folder.path)}))
    ended = json.loads((folder.path / "ended.json").read_text())
    assert (ended["state"], ended["can-heal"]) == ("failed", False)
    assert fault in ended["reason"]
    if fault != "events.jsonl":
        [event] = read_events(folder.path)
        assert (event.kind, event.words) == (EventKind.FAILED, ended["reason"])


def test_a_second_server_writes_nothing_into_the_folder_of_the_first(tmp_path, make_run, monkeypatch):
    monkeypatch.setattr("server.run_folder._LOCK_WAIT_S", 0.0)
    folder = RunFolder.create(tmp_path / "run", make_run())
    with folder.at_work(), pytest.raises(RunError, match="another process is at work"):
        app(None, Context(1, 1, {}, RecordDict(), {"resume": str(folder.path)}))
    assert not (folder.path / "ended.json").exists()
