"""A real SuperNode behind a proxy: all that it says to its SuperLink goes through CONNECT, and no other way."""

import base64
import http.server
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from server.flower_cli import ROOT
from tests.unit.server.test_kit_network import Proxy, serving

CREDENTIALS = ROOT / "configs" / "deployment" / "credentials.sh"
SUPERNODE = Path(sys.executable).parent / "flower-supernode"


class SuperLink(http.server.BaseHTTPRequestHandler):
    """Refuses every SuperNode, and keeps what it was asked for."""

    asked: list[str] = []  # noqa: RUF012

    def do_POST(self):
        self.asked.append(self.path)
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response_only(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class PasswordProxy(Proxy):
    """Lets nobody through without name and password."""

    asked: list[str] = []  # noqa: RUF012

    def do_CONNECT(self):
        expected = f"Basic {base64.b64encode(b'north:secret').decode()}"
        if self.headers["Proxy-Authorization"] != expected:
            self.send_error(407)
            return
        super().do_CONNECT()


@pytest.fixture
def superlink(tmp_path):
    subprocess.run([CREDENTIALS, "coordinator", tmp_path, "localhost"], check=True)
    subprocess.run([CREDENTIALS, "site", tmp_path, "north"], check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    SuperLink.asked.clear()
    PasswordProxy.asked.clear()
    with serving(SuperLink, context) as port:
        yield port


def start_supernode(folder: Path, port: int, **environment: str) -> str:
    """Start a SuperNode, which ends as it is refused; returns what it printed."""
    words = [SUPERNODE, "--superlink", f"localhost:{port}", "--root-certificates", folder / "ca.crt"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = str(free.getsockname()[1])
    words += ["--auth-supernode-private-key", folder / "north", "--host", "127.0.0.1", "--port", own]
    words += ["--isolation", "process"]  # starts no second program
    kept = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    kept |= {"FLWR_HOME": str(folder / "flwr"), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    done = subprocess.run(words, env=kept | environment, capture_output=True, text=True, check=False, timeout=120)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_supernode_reaches_its_superlink_through_a_proxy_with_a_password(superlink, tmp_path):
    with serving(PasswordProxy) as proxy:
        start_supernode(tmp_path, superlink, HTTPS_PROXY=f"http://north:secret@127.0.0.1:{proxy}")
        assert set(PasswordProxy.asked) == {f"localhost:{superlink}"}
        assert SuperLink.asked == ["/v1/fleet/activate-node"]


@pytest.mark.slow
def test_a_proxy_that_refuses_is_not_gone_round(superlink, tmp_path):
    with serving(PasswordProxy) as proxy:
        printed = start_supernode(tmp_path, superlink, HTTPS_PROXY=f"http://127.0.0.1:{proxy}")
    assert "407" in printed
    assert (SuperLink.asked, PasswordProxy.asked) == ([], [])
