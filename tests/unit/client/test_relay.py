"""The relay finds a worker that comes late, and asks again one that went away while it worked; but not for ever."""

import socket
import threading
from pathlib import Path

import pytest

from client import relay
from panfm.errors import ProtocolError
from panfm.sharing.frames import Frame, Kind, address, encode, receive
from panfm.sharing.messages import Records

QUESTION = Frame(Kind.ROUND, Records(config={"round": 1}))
ANSWER = Frame(Kind.ANSWER, Records(metrics={"loss": 0.5}))


@pytest.fixture
def worker(tmp_path):
    """A worker that dies over its first `deaths` questions, each time after having read them."""
    path, asked = str(tmp_path / "worker.sock"), []

    def start(deaths: int, answer: bytes = b"") -> tuple[str, list]:
        listener = socket.socket(socket.AF_UNIX)
        with address(Path(path)) as short:
            listener.bind(short)
        listener.listen()

        def serve() -> None:
            with listener:
                for number in range(deaths + 1):
                    connection, _ = listener.accept()
                    with connection:
                        asked.append(receive(connection, timeout_s=60.0))
                        if number == deaths:
                            connection.sendall(answer or encode(ANSWER))

        threading.Thread(target=serve, daemon=True).start()
        return path, asked

    return start


@pytest.mark.parametrize("deaths", [0, 1, relay.ATTEMPTS - 1])
def test_it_asks_again(worker, deaths):
    path, asked = worker(deaths)
    lost = []
    assert relay.ask(path, QUESTION, lambda: lost.append(1)) == ANSWER
    assert asked == [QUESTION] * (deaths + 1)
    assert bool(lost) == bool(deaths)


def test_but_not_for_ever(worker):
    path, asked = worker(relay.ATTEMPTS)
    with pytest.raises(ConnectionError):
        relay.ask(path, QUESTION)
    assert len(asked) == relay.ATTEMPTS


def test_a_worker_that_comes_late_is_found(worker, tmp_path, monkeypatch):
    monkeypatch.setattr(relay, "_POLL_S", 0.01)
    timer = threading.Timer(0.1, worker, (0,))
    timer.start()
    lost = []
    assert relay.ask(str(tmp_path / "worker.sock"), QUESTION, lambda: lost.append(1)) == ANSWER
    assert lost


def test_an_answer_that_is_none_is_refused(worker):
    path, _ = worker(0, b"HTTP/1.1 200 OK\r\n\r\n" + bytes(64))
    with pytest.raises(ProtocolError, match="not a message of panfm"):
        relay.ask(path, QUESTION)
