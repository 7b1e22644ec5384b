"""Checks of a machine, with stand-ins for nft, systemd, the mounts of /proc, and the coordinator's door."""

import http.server
import os
import ssl
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from panfm.cli import machine_checks
from panfm.cli.machine_checks import (
    Finding,
    certificate_finding,
    check_closed,
    check_connection,
    check_disk,
    check_port,
    check_processes_hidden,
    check_rules,
    check_units,
)
from panfm.config import load_site
from server.coordinator import app
from simulations.engines.deployment import credentials

CHAIN = "table inet panfm_site {\n\tchain output {\n\t\ttype filter hook output priority filter; policy accept;\n"
RULE = '\t\toifname "lo" tcp dport 9094 meta skuid != 65534 counter packets 0 bytes 0 reject with tcp reset\n'
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other accounts, which root alone may")


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put a program into PATH, and no other of its name."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def write(name: str, text: str, status: int = 0) -> None:
        path = tmp_path / name
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
        to = ">&2" if status else ""
        path.write_text(f'#!/bin/sh\ncat "{tmp_path}/{name}.txt" {to}\nexit {status}\n', encoding="utf-8")
        path.chmod(0o755)

    return write


@pytest.mark.parametrize(
    ("rules", "state", "words"),
    [
        (RULE, "ok", "only nobody may connect"),
        (RULE.replace("65534", '"nobody"'), "ok", "only nobody may connect"),
        (RULE.replace("65534", "{ 65534 }").replace("9094", "{ 9094, 9095 }"), "ok", "only nobody may connect"),
        (RULE.replace("reject with tcp reset", "drop"), "ok", "only nobody may connect"),
        ("", "FAULT", "no rule for it"),
        (RULE.replace("9094", "9095"), "FAULT", "no rule for it"),
        (RULE.replace("9094", "19094"), "FAULT", "no rule for it"),
        (RULE.replace("reject with tcp reset", "accept"), "FAULT", "no rule for it"),
        (RULE.replace('"lo"', '"eth0"'), "FAULT", "no rule for it"),
        (RULE.replace("65534", "{ 0, 65534 }"), "FAULT", "they let in nobody, root, expected nobody"),
        (RULE.replace("65534", "0"), "FAULT", "they let in root, expected nobody"),
    ],
)
def test_the_rules_are_read(program, rules, state, words):
    program("nft", f"{CHAIN}{rules}\t}}\n}}\n")
    found = check_rules("site", 9094, ("nobody",))
    assert found.state == state, found
    assert words in found.words


@pytest.mark.parametrize(
    ("text", "state", "words"),
    [
        ("Error: No such file or directory\n", "FAULT", "panfm_site is not loaded"),
        ("Operation not permitted (you must be root)\n", "unknown", "run this as root"),
    ],
)
def test_rules_that_cannot_be_read(program, text, state, words):
    program("nft", text, status=1)
    found = check_rules("site", 9094, ("nobody",))
    assert found.state == state
    assert words in found.words


def test_without_nft_nothing_is_known(monkeypatch):
    monkeypatch.setattr(machine_checks.shutil, "which", lambda *_, **__: None)
    assert check_rules("site", 9094, ("nobody",)).state == "unknown"


def test_a_table_that_filters_nothing(program):
    program("nft", f"table inet panfm_site {{\n\tchain output {{\n{RULE}")
    assert check_rules("site", 9094, ("nobody",)).state == "FAULT"


def test_a_port_that_answers_everybody_is_a_fault():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as local:
        found = check_port(local.server_port, ("no-such-account",))
        assert found.state == "FAULT"
        assert "must be refused" in found.words
        assert check_port(local.server_port, (str(os.geteuid()),)).state == "ok"
        port = local.server_port
    assert "nothing listens" in check_port(port, ()).words
    with http.server.ThreadingHTTPServer(("0.0.0.0", 0), http.server.BaseHTTPRequestHandler) as local:
        assert "other addresses than loopback" in check_port(local.server_port, ()).words


@pytest.mark.parametrize(
    ("options", "state"),
    [("rw,nosuid,hidepid=invisible", "ok"), ("rw,hidepid=2", "ok"), ("rw,hidepid=1", "FAULT"), ("rw", "FAULT")],
)
def test_processes_are_hidden(tmp_path, options, state):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"proc /proc proc rw,hidepid=2 0 0\nproc /proc proc {options} 0 0\ntmpfs /x tmpfs rw 0 0\n")
    assert check_processes_hidden(mounts).state == state


@pytest.fixture
def open_way(tmp_path):
    """A file whose folders everybody may enter."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() != "root" or not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    path = tmp_path / "data" / "key"
    path.parent.mkdir()
    path.parent.chmod(0o755)
    path.write_text("secret words")
    return path


@AS_ROOT
@pytest.mark.parametrize(
    ("folder", "file", "owner", "state"),
    [
        (0o755, 0o600, "root", "ok"),
        (0o755, 0o604, "root", "FAULT"),
        (0o755, 0o640, "nogroup", "FAULT"),
        (0o700, 0o666, "root", "ok"),
        (0o711, 0o644, "root", "FAULT"),
        (0o755, 0o606, "nobody", "FAULT"),
        (0o755, 0o066, "nobody", "ok"),
    ],
)
def test_who_may_read_is_found_by_rights(open_way, folder, file, owner, state):
    ids = {"root": (0, 0), "nogroup": (0, 65534), "nobody": (65534, 65534)}
    os.chown(open_way, *ids[owner])
    open_way.chmod(file)
    open_way.parent.chmod(folder)
    found = check_closed(open_way, ("nobody", "no-such-account"), kind="key")
    assert found.state == state, found
    assert "secret words" not in found.words


@AS_ROOT
def test_a_folder_that_can_be_entered_or_listed_is_open(open_way):
    for mode in (0o701, 0o704):
        open_way.parent.chmod(mode)
        assert check_closed(open_way.parent, ("nobody",), kind="state").state == "FAULT"
    open_way.parent.chmod(0o700)
    assert check_closed(open_way.parent, ("nobody",), kind="state").state == "ok"


def test_what_is_missing(tmp_path):
    assert check_closed(tmp_path / "key", ("nobody",), kind="key").state == "FAULT"
    assert check_closed(tmp_path / "state", ("nobody",), kind="state", is_needed=False).state == "ok"


@pytest.mark.parametrize(("days", "state"), [(400, "ok"), (29, "FAULT"), (-1, "FAULT")])
def test_certificates_end(days, state):
    assert certificate_finding("certificate", time.time() + 86_400 * days).state == state


def test_units_are_asked_where_systemd_runs(program, monkeypatch, tmp_path):
    monkeypatch.setattr(machine_checks, "Path", lambda *_: tmp_path)
    program("systemctl", "inactive\n")
    [found] = check_units(["panfm-worker"])
    assert (found.state, found.words.split(";")[0]) == ("FAULT", "is inactive")
    program("systemctl", "active\n")
    assert [one.state for one in check_units(["panfm-worker", "nginx"])] == ["ok", "ok"]
    monkeypatch.setattr(machine_checks, "Path", lambda *_: tmp_path / "absent")
    assert check_units(["panfm-worker"]) == []


def test_a_full_disk(tmp_path, monkeypatch):
    assert check_disk(tmp_path / "absent").subject.endswith("absent")
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda _: SimpleNamespace(total=2**40, free=2**30))
    assert check_disk(tmp_path).state == "FAULT"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    credentials("coordinator", folder, "localhost")
    return folder


@contextmanager
def served(keys: Path, answers: dict[str, int], ahead_s: float = 0.0):
    """A door that answers as told."""

    class Door(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(answers[self.path.split("/")[2]])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def date_time_string(self, timestamp=None):
            return super().date_time_string(time.time() + ahead_s)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door) as local:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(keys / "server.pem", keys / "server.key")
        local.socket = context.wrap_socket(local.socket, server_side=True)
        thread = threading.Thread(target=local.serve_forever, args=(0.01,))
        thread.start()
        yield local.server_port
        local.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("fleet", "control", "ahead_s", "faults"),
    [
        (401, 404, 0.0, []),
        (502, 404, 0.0, ["the SuperLink behind it is down"]),
        (404, 404, 0.0, ["no SuperLink of ours"]),
        (401, 200, 0.0, ["must publish the fleet routes alone"]),
        (401, 404, 1000.0, ["behind that of localhost"]),
        (401, 404, -1000.0, ["ahead of that of localhost"]),
    ],
)
def test_the_coordinators_door(keys, monkeypatch, fleet, control, ahead_s, faults):
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    with served(keys, {"fleet": fleet, "control": control}, ahead_s) as port:
        found = check_connection("localhost", port, keys / "ca.crt", connect_to="127.0.0.1")
    told = [one.words for one in found if one.state != "ok"]
    assert len(told) == len(faults)
    assert all(words in text for words, text in zip(faults, told, strict=True))


def test_a_door_that_is_not_the_coordinators(keys, tmp_path):
    credentials("coordinator", tmp_path / "others", "localhost")
    with served(keys, {}) as port:
        [found] = check_connection("localhost", port, tmp_path / "others" / "ca.crt", connect_to="127.0.0.1")
        assert (found.state, found.words[:4]) == ("FAULT", "TLS:")
        [found] = check_connection("localhost", port, tmp_path / "absent.crt")
        assert found.state == "FAULT"
    [found] = check_connection("localhost", port, keys / "ca.crt")
    assert "ConnectionRefusedError" in found.words


def test_one_line_per_check_and_the_exit_status(capsys):
    machine_checks.tell([Finding("ok", "a", "b")])
    with pytest.raises(machine_checks.typer.Exit):
        machine_checks.tell([Finding("ok", "a", "b"), Finding("unknown", "c", "d\ne")])
    assert capsys.readouterr().out == "ok       a: b\nok       a: b\nunknown  c: d e\n"


def test_the_command_of_the_coordinator(keys, tmp_path):
    words = ["doctor", "--config", str(keys), "--state", str(tmp_path), "--runs", str(tmp_path / "runs")]
    done = CliRunner().invoke(app, [*words, "--port", "1", "--door", "1"])
    assert done.exit_code == 1
    assert f"ok       certificate {keys / 'server.pem'}: ends" in done.output
    assert "FAULT    port 1: nothing listens" in done.output
    assert f"FAULT    run folders {tmp_path / 'runs'}: is not there" in done.output
    assert "PRIVATE KEY" not in done.output


def test_the_command_of_a_site(tmp_path, write_site):
    from panfm.cli.site_doctor import site_findings

    folder = write_site(tmp_path / "site", "alpha", ("brain",))
    found = {one.subject: one for one in site_findings(folder, load_site(folder), 1)}
    assert found["worker"].state == "FAULT"
    assert found["port 1"].state == "FAULT"
    assert not [one for one in found.values() if "alpha-0" in one.line()]
