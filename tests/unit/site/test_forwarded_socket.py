"""A worker whose socket is forwarded, as `ssh -R` does for a job on a cluster's node, answers as over its own."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from client.relay import ask
from panfm.config import parse_run
from panfm.sharing.frames import Frame, Kind, address
from panfm.sharing.messages import Handshake, Invitation, RoundReply
from panfm.site import Site
from panfm.site.worker import Worker, listen
from tests.cases import approve
from tests.unit.site.test_site import same, task


def copy(source: socket.socket, target: socket.socket) -> None:
    while content := source.recv(65536):
        target.sendall(content)
    target.shutdown(socket.SHUT_WR)


@contextmanager
def forwarded(path: Path, to: Path, times: int) -> Iterator[None]:
    """A socket that carries so many connections, one after the other, to another one."""

    def serve() -> None:
        for _ in range(times):
            with listener.accept()[0] as near, socket.socket(socket.AF_UNIX) as far:
                with address(to) as short:
                    far.connect(short)
                back = threading.Thread(target=copy, args=(far, near))
                back.start()
                copy(near, far)
                back.join()

    with socket.socket(socket.AF_UNIX) as listener:
        with address(path) as short:
            listener.bind(short)
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def test_handshake_and_round_through_a_forwarded_socket(tmp_path, write_site):
    folder = write_site(tmp_path / "alpha", "alpha", ("brain", "heart"))
    approve(folder, parse_run(task().run_toml))
    path, gateway = folder / ".panfm" / "run" / "worker.sock", tmp_path / "gateway.sock"
    invitation = Invitation(task().run_toml)
    questions = [Frame(Kind.HANDSHAKE, invitation.to_records()), Frame(Kind.ROUND, task().to_records())]
    with (
        listen(folder, Site(folder).config) as listener,
        ThreadPoolExecutor(1) as pool,
        forwarded(gateway, path, len(questions)),
    ):
        worker = Worker(folder, listener)
        answers = []
        for question in questions:
            answer = pool.submit(ask, str(gateway), question)
            worker.serve_one()
            answers.append(answer.result())
    assert Handshake.from_records(answers[0].records) == Site(folder).handshake(invitation)
    elsewhere = Site(folder, tmp_path / "elsewhere")
    assert same(RoundReply.from_records(answers[1].records), elsewhere.train_round(task()))
