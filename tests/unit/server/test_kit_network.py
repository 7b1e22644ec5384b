"""Faults of name, port, certificate, clock and proxy that install.py of a kit tells, with servers on loopback."""

import email.utils
import http.server
import runpy
import select
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from server.flower_cli import ROOT

DEPLOYMENT = ROOT / "configs" / "deployment"


class Coordinator(http.server.BaseHTTPRequestHandler):
    """Answers 404 with the time of a clock that may be wrong, as the shipped nginx.conf does."""

    wrong_by = 0.0

    def do_GET(self):
        self.send_response_only(404)
        self.send_header("Date", email.utils.formatdate(time.time() + self.wrong_by, usegmt=True))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Proxy(http.server.BaseHTTPRequestHandler):
    """Connects whoever asks to the address that is asked for."""

    asked: list[str] = []  # noqa: RUF012

    def do_CONNECT(self):
        self.asked.append(self.path)
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port))) as other:
            self.send_response_only(200)
            self.end_headers()
            ways = {self.connection: other, other: self.connection}
            while data := [(ways[end], end.recv(65536)) for end in select.select([*ways], [], [], 5)[0]]:
                if not all(content for _, content in data):
                    return
                for target, content in data:
                    target.sendall(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(handler: type, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """A server on loopback; yields its port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A folder with install.py and ca.crt, and the certificate of localhost that it vouches for."""
    folder = tmp_path_factory.mktemp("kit")
    for name in ("kit", "other"):
        subprocess.run([DEPLOYMENT / "credentials.sh", "coordinator", folder / name, "localhost"], check=True)
    shutil.copy(DEPLOYMENT / "kit" / "install.py", folder / "kit")
    return folder


@pytest.fixture
def coordinator(kit, monkeypatch):
    monkeypatch.setattr(Coordinator, "wrong_by", 0.0)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(kit / "kit" / "server.pem", kit / "kit" / "server.key")
    with serving(Coordinator, context) as port:
        yield port


def faults(kit, monkeypatch, server: str, port: int, proxy: str = "") -> list[str]:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    return runpy.run_path(str(kit / "kit" / "install.py"))["network_faults"](server, port)


def test_a_coordinator_that_answers_is_no_fault(kit, monkeypatch, coordinator):
    assert faults(kit, monkeypatch, "localhost", coordinator) == []


@pytest.mark.parametrize(("wrong_by", "words"), [(900.0, "behind"), (-900.0, "ahead of")])
def test_a_clock_that_is_wrong_is_told(kit, monkeypatch, coordinator, wrong_by, words):
    monkeypatch.setattr(Coordinator, "wrong_by", wrong_by)
    [fault] = faults(kit, monkeypatch, "localhost", coordinator)
    assert fault.startswith(("clock: 899 s", "clock: 900 s", "clock: 901 s"))
    assert f"{words} the coordinator's" in fault
    monkeypatch.setattr(Coordinator, "wrong_by", wrong_by / 3.1)
    assert faults(kit, monkeypatch, "localhost", coordinator) == []


def test_another_authority_is_told(kit, monkeypatch, coordinator, tmp_path):
    (tmp_path / "kit").mkdir()
    shutil.copy(kit / "other" / "ca.crt", tmp_path / "kit")
    shutil.copy(kit / "kit" / "install.py", tmp_path / "kit")
    [fault] = faults(tmp_path, monkeypatch, "localhost", coordinator)
    assert fault.startswith(f"TLS: localhost:{coordinator}: ")
    assert "does not vouch for it" in fault


def test_a_name_that_nobody_knows_and_a_port_that_is_shut_are_told(kit, monkeypatch):
    [fault] = faults(kit, monkeypatch, "nowhere.invalid", 443)
    assert fault.startswith("DNS: nowhere.invalid: ")
    with socket.socket() as shut:
        shut.bind(("127.0.0.1", 0))
        port = shut.getsockname()[1]
        [fault] = faults(kit, monkeypatch, "localhost", port)
    assert fault.startswith(f"network: localhost:{port}: ")
    assert fault.endswith("or set HTTPS_PROXY")


def test_a_proxy_is_used_and_named(kit, monkeypatch, coordinator):
    with serving(Proxy) as port:
        assert faults(kit, monkeypatch, "localhost", coordinator, f"http://127.0.0.1:{port}") == []
        assert faults(kit, monkeypatch, "localhost", coordinator, f"127.0.0.1:{port}") == []
    assert Proxy.asked == [f"localhost:{coordinator}"] * 2
    [fault] = faults(kit, monkeypatch, "localhost", coordinator, f"http://127.0.0.1:{port}")
    assert f"through the proxy 127.0.0.1:{port}" in fault
