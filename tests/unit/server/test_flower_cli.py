"""Flower's command line, with answers as Flower 1.41 gives them, and real doors that do not open."""

import json
import socket
import ssl
import subprocess
import threading
from types import SimpleNamespace

import pytest

from panfm.errors import RunError, one_line
from server import flower_cli
from server.flower_cli import FlowerRun, flwr

UNAVAILABLE = (
    "Using SuperLink: x (127.0.0.1:1)\n Listing all runs...\n\nConnection to the SuperLink is unavailable. Please "
    "check your network connection and 'address' in the SuperLink connection configuration."
)


@pytest.fixture
def answers(monkeypatch):
    """What `flwr` prints; exits with 0, as the real one does."""
    said = SimpleNamespace(stdout="", stderr="", words=[])

    def run(words, **_):
        said.words.append(words)
        return said

    monkeypatch.setattr(flower_cli.subprocess, "run", run)
    return said


def test_an_answer_in_json_after_other_words(answers):
    answers.stdout = 'Loading project...\n{"success": true, "runs": [{"status": "finished:failed"}]}'
    assert FlowerRun("7", "x").entry({}) == ("finished:failed", "no details")
    assert answers.words == [["flwr", "list", "x", "--run-id", "7", "--format", "json"]]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Using SuperLink: x (h:1)\n Stopping run...\n\n[code: 16] Run ID not found.", "[code: 16] Run ID not found."),
        ("\nAn error.\nSuperLink connection 'x' not found", "An error. SuperLink connection 'x' not found"),
        ("\x1b[31mred\x1b[0m", "?[31mred?[0m"),
    ],
)
def test_a_refusal_is_one_line(answers, text, told):
    answers.stdout = json.dumps({"success": False, "error-message": text})
    with pytest.raises(RunError) as caught:
        FlowerRun("5", "x").stop({})
    assert str(caught.value) == f"flwr stop: {told}"


def test_no_answer_is_one_line(answers):
    answers.stdout, answers.stderr = "", "Traceback\n  boom\nValueError: x\n"
    with pytest.raises(RunError, match=r"^flwr list: Traceback boom ValueError: x$"):
        flwr(["list", "x"], {})


@pytest.fixture
def certificate(tmp_path):
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost"]
    for name in ("own", "other"):
        out = ["-keyout", str(tmp_path / f"{name}.key"), "-out", str(tmp_path / f"{name}.crt")]
        subprocess.run(["openssl", *words.split(), *names, *out], check=True, capture_output=True)
    return tmp_path


@pytest.fixture
def door(certificate):
    """A TLS server that says nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "own.crt", certificate / "own.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            try:
                while True:
                    with listener.accept()[0] as plain:
                        try:
                            context.wrap_socket(plain, server_side=True).close()
                        except OSError:
                            continue
            except OSError:
                return

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def why(answers, home, entry: str) -> str:
    (home / "config.toml").write_text(f"[superlink.x]\n{entry}\n")
    answers.stdout = json.dumps({"success": False, "error-message": UNAVAILABLE})
    with pytest.raises(RunError) as caught:
        flwr(["list", "x"], {"FLWR_HOME": str(home)})
    assert str(caught.value) == one_line(str(caught.value), 1000)
    return str(caught.value)


def test_why_a_superlink_is_unavailable(certificate, door, monkeypatch):
    home, answers = certificate, SimpleNamespace(stdout="", stderr="")
    with monkeypatch.context() as patch, socket.socket() as closed:  # it has a port, and listens to nobody
        patch.setattr(flower_cli.subprocess, "run", lambda *_, **__: answers)
        closed.bind(("127.0.0.1", 0))
        dead = closed.getsockname()[1]
        own, other = (f'root-certificates = "{home / name}.crt"' for name in ("own", "other"))
        where = f"connection x of {home / 'config.toml'}: localhost:{door}"
        assert "does not answer" in why(answers, home, f'address = "127.0.0.1:{dead}"\n{own}')
        assert why(answers, home, f'address = "localhost:{door}"\n{other}').startswith(
            f"{where} has a certificate that is not trusted ("
        )
        assert why(answers, home, f'address = "localhost:{door}"\ninsecure = true').startswith(
            f"{where} answers, but not in plain text"
        )
        assert (
            why(answers, home, f'address = "localhost:{door}"\n{own}') == f"{where} answers, but does not speak to us"
        )
        assert "localhost does not answer" in why(answers, home, f'address = "localhost"\n{own}')


def test_one_line():
    assert one_line("a\n b\t\u202ec\x1b[0m") == "a b ?c?[0m"
    assert one_line("x" * 400) == "x" * 297 + "..."
    assert one_line("Größe 5 µm") == "Größe 5 µm"
    assert one_line("") == ""
