"""Alerts, sent to a real HTTP server and a real SMTP server of this machine."""

import errno
import http.server
import json
import re
import socketserver
import threading
import time
from contextlib import contextmanager
from http.client import InvalidURL
from pathlib import Path

import pytest
from typer.testing import CliRunner

import server.alerts as alerts
from panfm.errors import ConfigError, RunError
from panfm.files import locked
from panfm.outputs import write_json
from panfm.report.run_events import EventKind, read_events
from server.alert_senders import why_failed
from server.alerts import alerted, deliver_pending, delivered
from server.alerts_config import parse_alerts
from server.coordinator import app
from server.events import EventLog
from server.run_folder import RunFolder


class Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        status = 400 if content["event"]["kind"] == self.server.refused else status
        if status == 200:
            self.server.got.append(content)
        self.send_response(status)
        self.send_header("Location", f"http://127.0.0.1:{self.server.server_address[1]}/moved")
        self.end_headers()

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


class Mailbox(socketserver.StreamRequestHandler):
    def handle(self):
        def say(text):
            self.wfile.write(f"{text}\r\n".encode())

        say("220 here")
        while line := self.rfile.readline().decode().strip():
            if line.upper() == "DATA":
                say("354 go on")
                letter = []
                while (text := self.rfile.readline().decode().rstrip("\r\n")) != ".":
                    letter.append(text)
                self.server.got.append("\n".join(letter))
            say("221 bye" if line.upper() == "QUIT" else "250 ok")
            if line.upper() == "QUIT":
                return


@contextmanager
def served(handler):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as local:
        local.daemon_threads = True
        local.got, local.statuses, local.refused = [], [], None
        thread = threading.Thread(target=local.serve_forever, args=(0.01,))
        thread.start()
        yield local
        local.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(alerts, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(alerts, "_POLL_S", 0.005)


def wait_for(got, count):
    deadline = time.monotonic() + 20
    while len(got) < count:
        assert time.monotonic() < deadline, got
        time.sleep(0.005)


def late(number):
    return {"round": number, "sites": {"a": {}}, "rejected": {"b": "late"}, "away": {}}


def test_one_alert_for_each_event_also_over_a_resume(tmp_path):
    with served(Hook) as hook, served(Mailbox) as box:
        (tmp_path / "alerts.toml").write_text(
            f'[webhook]\nurl = "http://127.0.0.1:{hook.server_address[1]}/x"\n'
            f'[mail]\nhost = "127.0.0.1"\nport = {box.server_address[1]}\ntls = "none"\n'
            'sender = "panfm@example.org"\nto = ["a@example.org", "b@example.org"]\n'
        )
        for begin in (0, 5, 10):
            log = EventLog(tmp_path)
            with alerted(tmp_path, "toy", log):
                log.begin("toy-1", begin)
                for number in range(begin + 1, begin + 6):
                    log.note_round(late(number))
                log.note(EventKind.FAILED, "lost quorum")
    kinds = [content["event"]["kind"] for content in hook.got]
    assert kinds == ["started", "left-out", "failed", "resumed", "failed", "resumed", "failed"]
    assert hook.got[1]["text"] == "toy: left-out b: late (round 1)"
    assert len(box.got) == len(kinds)
    assert "Subject: [panfm] toy: left-out b" in box.got[1]
    assert "To: a@example.org, b@example.org" in box.got[1]
    assert "Message-ID: <2.toy-1@panfm.invalid>" in box.got[1]


def test_a_failing_webhook_is_tried_again_and_does_not_hold_the_run(tmp_path, caplog):
    with served(Hook) as hook:
        hook.statuses += [500, 404, 503]
        (tmp_path / "alerts.toml").write_text(f'[webhook]\nurl = "http://127.0.0.1:{hook.server_address[1]}"\n')
        log = EventLog(tmp_path)
        with alerted(tmp_path, "toy", log):
            log.begin("toy-1", 0)
            wait_for(hook.got, 1)
    assert [content["event"]["kind"] for content in hook.got] == ["started"]
    assert caplog.text.count("webhook failed") == 3


def test_what_is_not_out_at_the_end_goes_out_at_the_resume(tmp_path, caplog):
    with served(Hook) as hook:
        (tmp_path / "alerts.toml").write_text(
            f'kinds = ["failed"]\n[webhook]\nurl = "http://127.0.0.1:{hook.server_address[1]}"\n'
        )
        hook.statuses += [500] * 1000
        log = EventLog(tmp_path)
        with alerted(tmp_path, "toy", log):
            log.begin("toy-1", 0)
            log.note(EventKind.FAILED, "lost quorum")
        assert "1 not sent by webhook" in caplog.text
        hook.statuses.clear()
        with alerted(tmp_path, "toy", EventLog(tmp_path)):
            wait_for(hook.got, 1)
    assert [content["event"]["words"] for content in hook.got] == ["lost quorum"]


@pytest.fixture
def ended(tmp_path, make_run):
    """A run that has failed while nobody took its alerts."""
    folder = RunFolder.create(tmp_path / "run", make_run())
    folder.events.begin("toy-1", 0)
    folder.events.note(EventKind.FAILED, "lost quorum")
    return folder.path


def test_the_last_alert_is_sent_after_the_server_has_ended(ended, caplog):
    with served(Hook) as hook:
        webhook_of(ended, hook)
        hook.statuses += [503] * 6
        with pytest.raises(RunError, match="lost"), delivered(ended):
            raise RunError("lost quorum")
        assert [content["event"]["kind"] for content in hook.got] == ["started", "failed"]
        assert "lost quorum; waiting until 2 alerts are sent, for a day at most" in caplog.text
        with delivered(ended):
            pass
    assert len(hook.got) == 2


def test_two_processes_send_an_alert_once(ended):
    with served(Hook) as hook:
        webhook_of(ended, hook)
        hook.statuses += [503] * 3
        threads = [threading.Thread(target=deliver_pending, args=(ended,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(content["event"]["kind"] for content in hook.got) == ["failed", "started"]


def test_nothing_is_waited_for_where_it_cannot_be_sent(ended, caplog):
    deliver_pending(ended)
    (ended / "alerts.toml").write_text('[webhook]\nurl-env = "PANFM_TEST_NO_HOOK"\n')
    deliver_pending(ended)
    assert "none is sent from here: webhook.url: PANFM_TEST_NO_HOOK is empty" in caplog.text
    (ended / "alerts.toml").write_text('[webhook]\nurl = "http://127.0.0.1:1"\n')
    with locked(ended / ".lock", wait_s=0):
        deliver_pending(ended)


def test_the_wait_ends_when_a_server_is_at_work_again(ended):
    (ended / "alerts.toml").write_text('[webhook]\nurl = "http://127.0.0.1:1"\n')
    waiting = threading.Thread(target=deliver_pending, args=(ended,))
    waiting.start()
    with locked(ended / ".lock", wait_s=5):
        waiting.join(20)
        assert not waiting.is_alive()


def test_keep_sends_what_the_server_could_not(ended):
    write_json(ended / "ended.json", {"state": "failed", "reason": "lost quorum", "can-heal": False})
    write_json(ended / "flower.json", {"run-id": "1", "connection": "nowhere"})
    with served(Hook) as hook:
        webhook_of(ended, hook)
        result = CliRunner().invoke(app, ["keep", str(ended)])
    assert result.exit_code != 0
    assert [content["event"]["kind"] for content in hook.got] == ["started", "failed"]


def test_an_alert_older_than_a_day_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(alerts, "_GIVEN_UP_S", -1.0)
    (tmp_path / "alerts.toml").write_text('[webhook]\nurl = "http://127.0.0.1:1"\n')
    log = EventLog(tmp_path)
    with alerted(tmp_path, "toy", log):
        log.begin("toy-1", 0)
    (record,) = map(json.loads, (tmp_path / "alerts.jsonl").read_text().splitlines())
    assert (record["event"], record["state"]) == (1, "given-up")


def no_space(_):
    raise OSError(errno.ENOSPC, "disk full")


def webhook_of(folder, hook, kinds="[]"):
    head = "" if kinds == "[]" else f"kinds = {kinds}\n"
    (folder / "alerts.toml").write_text(f'{head}[webhook]\nurl = "http://127.0.0.1:{hook.server_address[1]}"\n')


def test_a_redirect_is_a_failure(tmp_path, caplog):
    with served(Hook) as hook:
        hook.statuses += [302, 301, 303]
        webhook_of(tmp_path, hook)
        log = EventLog(tmp_path)
        with alerted(tmp_path, "toy", log):
            log.begin("toy-1", 0)
            wait_for(hook.got, 1)
    assert caplog.text.count("webhook failed") == 3


def test_an_alert_that_is_refused_does_not_hold_up_the_others(tmp_path):
    with served(Hook) as hook:
        hook.refused = "started"
        webhook_of(tmp_path, hook)
        log = EventLog(tmp_path)
        with alerted(tmp_path, "toy", log):
            log.begin("toy-1", 0)
            for number in range(1, 4):
                log.note_round(late(number))
                log.note_round({"round": number, "sites": {"b": {}}, "rejected": {}, "away": {}})
            wait_for(hook.got, 6)
            hook.refused = None
            wait_for(hook.got, 7)
    assert [content["event"]["kind"] for content in hook.got] == ["left-out", "back"] * 3 + ["started"]


def test_what_a_full_disk_did_not_take_is_told_all_the_same_and_once(tmp_path, monkeypatch):
    with served(Hook) as hook:
        webhook_of(tmp_path, hook)
        log = EventLog(tmp_path)
        with alerted(tmp_path, "toy", log):
            log.begin("toy-1", 0)
            wait_for(hook.got, 1)
            with monkeypatch.context() as full:
                full.setattr("server.events.sync", no_space)
                log.note(EventKind.FAILED, "disk full")
                wait_for(hook.got, 2)
        assert len(read_events(tmp_path)) == 1
        again = EventLog(tmp_path)
        with alerted(tmp_path, "toy", again):
            again.begin("toy-1", 0)
            wait_for(hook.got, 4)
    kinds = ["started", "failed", "failed", "resumed"]
    assert [content["event"]["kind"] for content in hook.got] == kinds
    told = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert [(line["event"], line["state"]) for line in told] == [(number, "sent") for number in (1, 2, 3)]


def test_the_record_of_an_alert_is_written_once_the_disk_has_room(tmp_path, monkeypatch):
    with served(Hook) as hook:
        webhook_of(tmp_path, hook)
        log = EventLog(tmp_path)
        with alerted(tmp_path, "toy", log):
            with monkeypatch.context() as full:
                full.setattr("server.events.sync", no_space)
                log.begin("toy-1", 0)
                wait_for(hook.got, 1)
            log.note(EventKind.FAILED, "lost quorum")
        with alerted(tmp_path, "toy", EventLog(tmp_path)):
            pass
    assert [content["event"]["kind"] for content in hook.got] == ["started", "failed"]


def test_a_jump_of_the_clock_gives_no_alert_up(tmp_path):
    with served(Hook) as hook:
        hook.statuses += [500]
        webhook_of(tmp_path, hook)
        log = EventLog(tmp_path)
        log.begin("toy-1", 0)
        (tmp_path / "events.jsonl").write_text(
            (tmp_path / "events.jsonl").read_text().replace(read_events(tmp_path)[0].time, "2001-01-01T00:00:00+00:00")
        )
        with alerted(tmp_path, "toy", log):
            wait_for(hook.got, 1)


@pytest.mark.parametrize("rest", ["a b", "a\x01", "\u00e9", ":port/", ":99999/", "[::1/"])
def test_a_faulty_address_is_told_without_the_address(rest, monkeypatch):
    url = f"https://secret.example.org{rest}"
    monkeypatch.setenv("PANFM_TEST_HOOK", url)
    with pytest.raises(ConfigError, match="without spaces") as told:
        parse_alerts(f"[webhook]\nurl = {json.dumps(url)}", "alerts.toml")
    assert "secret" not in str(told.value)
    with pytest.raises(ConfigError, match="without spaces") as told:
        parse_alerts('[webhook]\nurl-env = "PANFM_TEST_HOOK"', "alerts.toml").webhook.address()
    assert "secret" not in str(told.value)


def test_errors_that_quote_the_address_are_told_by_their_type():
    assert why_failed(InvalidURL("/secret path")) == "InvalidURL"
    assert why_failed(ValueError("unknown url type: secret")) == "ValueError"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('kinds = ["rain"]', "kinds"),
        ("[webhook]", "expected one of url, url-env and url-file"),
        ('[mail]\nhost = "h"\nsender = "a"\nto = ["b@c"]', "sender"),
        ('[mail]\nhost = "h"\nsender = "a@b"\nto = ["b@c"]\nuser = "u"', "password-file"),
        (
            '[mail]\nhost = "h"\nsender = "a@b"\nto = ["b@c"]\nuser = "u"\npassword-env = "P"\ntls = "none"',
            "would send the password in clear",
        ),
        ('slack = "x"', "slack"),
    ],
)
def test_a_faulty_description_of_alerts(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_alerts(text, "alerts.toml")


def test_secrets_are_named_not_written(tmp_path, monkeypatch):
    (tmp_path / "url").write_text("https://hooks.example.org/secret\n")
    webhook = parse_alerts(f'[webhook]\nurl-file = "{tmp_path / "url"}"', "alerts.toml").webhook
    assert webhook.address() == "https://hooks.example.org/secret"
    webhook = parse_alerts('[webhook]\nurl-env = "PANFM_TEST_HOOK"', "alerts.toml").webhook
    with pytest.raises(ConfigError, match="PANFM_TEST_HOOK is empty"):
        webhook.address()
    monkeypatch.setenv("PANFM_TEST_HOOK", "file:///etc/passwd")
    with pytest.raises(ConfigError, match="https://"):
        webhook.address()


@pytest.mark.parametrize("page", ["monitoring.md", "coordinator.md"])
def test_the_examples_of_the_pages_hold(page):
    text = (Path(__file__).parents[3] / "docs" / page).read_text(encoding="utf-8")
    [example] = re.findall(r"```toml\n(kinds = .*?)```", text, re.DOTALL)
    config = parse_alerts(example, page)
    assert config.webhook
    assert config.mail
