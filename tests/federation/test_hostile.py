"""A site's worker as a real process, and a client on its machine that wants more than it should get."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from client.relay import ask
from panfm.config import dump_toml, parse_run
from panfm.models import build_model
from panfm.sharing.frames import Frame, Kind, address, encode
from panfm.sharing.groups import GroupManifest
from panfm.sharing.messages import Invitation, Records, RoundReply, RoundTask
from panfm.site import Site
from panfm.site.audit_log import AuditLog
from simulations.engines.flower import private_environment
from simulations.engines.processes import Process, end, send_signal, start, wait_until
from tests.cases import approve
from tests.federation.conftest import RUN

pytestmark = pytest.mark.slow
NOBODY = 65534
run = parse_run(RUN)


class Worker:
    """`panfm site start`, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / ".panfm" / "run" / "worker.sock"
        self.process: Process | None = None

    def start(self) -> None:
        environment = private_environment(self.folder)
        self.process = start(["panfm", "site", "start", str(self.folder)], self.folder / "worker.log", environment)
        wait_until(self.listens, "worker", 300.0, self.process)

    def listens(self) -> bool:
        try:
            with connected(self.socket):
                return True
        except OSError:
            return False

    def ask(self, kind: Kind, records: Records) -> Frame:
        return ask(str(self.socket), Frame(kind, records))


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as stranger, address(path) as short:
        stranger.connect(short)
        yield stranger


@pytest.fixture(scope="module")
def worker(tmp_path_factory, write_site):
    folder, many = tmp_path_factory.mktemp("sites") / "alpha", "[limits]\nruns-at-once = 9\n"
    worker = Worker(write_site(folder, "alpha", ("brain", "heart"), subjects=8, extra=many))
    approve(folder, run)
    worker.start()
    yield worker
    end(worker.process)


def task(number: int, **changes) -> RoundTask:
    model = build_model(run)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    groups = GroupManifest.of(model.parameter_groups(), tensors).pack_all(tensors)
    groups.pop("stream:liver-mr")
    return RoundTask(
        **{"run_id": "run-1", "round_number": number, "run_toml": dump_toml(run), "groups": groups} | changes
    )


def updates(answer: Frame) -> dict[str, bytes]:
    assert answer.kind is Kind.ANSWER, answer.records.config
    return {name: array.tobytes() for name, array in RoundReply.from_records(answer.records).updates.items()}


def test_killed_in_a_round_it_is_asked_again_and_gives_the_same_bits(worker, tmp_path):
    expected = Site(worker.folder, tmp_path / "elsewhere")
    expected.train_round(task(1))
    worker.ask(Kind.ROUND, task(1).to_records())
    os.killpg(worker.process.pid, signal.SIGSTOP)  # it accepts nothing, the kernel does
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(worker.ask, Kind.ROUND, task(2).to_records())
        time.sleep(0.5)
        send_signal(worker.process, signal.SIGKILL)
        worker.start()
        found = updates(answer.result())
    assert found == {name: update.tobytes() for name, update in expected.train_round(task(2)).updates.items()}


def test_a_replayed_round_tells_nothing_new(worker):
    first = updates(worker.ask(Kind.ROUND, task(1, run_id="replay").to_records()))
    for _ in range(3):
        assert updates(worker.ask(Kind.ROUND, task(1, run_id="replay").to_records())) == first


def test_private_groups_are_not_to_be_had(worker):
    for group in ("teacher", "experts", "router", "optimiser", "stream:liver-mr", "../site.toml"):
        asked = task(1, groups=dict(task(1).groups) | {group: np.zeros(4, np.float32)})
        answer = worker.ask(Kind.ROUND, asked.to_records())
        assert answer.kind is Kind.ERROR or set(answer.records.arrays) == {
            "backbone", "head", "stream:brain-mr", "stream:heart-mr"
        }  # fmt: skip


@pytest.mark.parametrize(
    "records",
    [
        Records(),
        task(1, run_id="../../etc").to_records(),
        task(1, run_id="/etc").to_records(),
        task(0).to_records(),
        task(10**9).to_records(),
        task(1, run_toml='name = "x"').to_records(),
        task(1, run_toml=dump_toml(run) + f'\n[cohort]\nkind = "folder"\npath = "{os.sep}etc"\n').to_records(),
        task(1, groups={}).to_records(),
        task(1, groups={name: flat[:-1] for name, flat in task(1).groups.items()}).to_records(),
        task(1, groups={name: np.full_like(flat, np.nan) for name, flat in task(1).groups.items()}).to_records(),
    ],
)
def test_what_is_wrong_is_answered_without_a_word_of_the_site(worker, records):
    answer = worker.ask(Kind.ROUND, records)
    words = str(dict(answer.records.config))
    assert str(worker.folder) not in words
    assert "alpha-" not in words  # its subjects


def test_a_flood_of_broken_connections_does_not_end_it(worker):
    half = encode(Frame(Kind.ROUND, task(1).to_records()))[:-9]
    for content in [b"", b"\x00" * 40, half, os.urandom(64)] * 25:
        with connected(worker.socket) as stranger:
            stranger.sendall(content)
    assert worker.ask(Kind.HANDSHAKE, Invitation(dump_toml(run)).to_records()).kind is Kind.ANSWER


def as_nobody(act) -> str:
    """What another account of this machine meets: the kind of error, or what it got."""
    here, there = os.pipe()
    if not (child := os.fork()):
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            found = f"got {act()!r}"
        except OSError as error:
            found = type(error).__name__
        os.write(there, found.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(there)
    with os.fdopen(here) as pipe:
        return pipe.read()


def connect(path: Path) -> bytes:
    """What is answered to a question that the worker would answer."""
    with connected(path) as stranger:
        stranger.sendall(encode(Frame(Kind.HANDSHAKE, Invitation(dump_toml(run)).to_records())))
        return stranger.recv(100)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another account")
def test_another_account_gets_neither_files_nor_the_worker(worker):
    opened = [folder for folder in worker.folder.parents if folder.stat().st_mode & 0o005 == 0]
    modes = {folder: folder.stat().st_mode for folder in opened}
    for folder in opened:
        folder.chmod(0o755)  # pytest's own folders are closed; the site's must hold by themselves
    try:
        image = next(worker.folder.glob("*.nii.gz"))
        worker.folder.chmod(0o700)  # as `panfm site init` makes it, and `panfm site start` wants it
        assert as_nobody(lambda: image.read_bytes()) == "PermissionError"
        worker.folder.chmod(0o755)
        assert as_nobody(lambda: connect(worker.socket)) == "PermissionError"
        assert as_nobody(lambda: list((worker.folder / ".panfm" / "run").iterdir())) == "PermissionError"
        for name in (".panfm/state/departures.jsonl", ".panfm/cache"):
            assert as_nobody(lambda name=name: list((worker.folder / name).iterdir())) == "PermissionError"
        run_folder = worker.folder / ".panfm" / "run"
        for path, mode in ((run_folder.parent, 0o755), (run_folder, 0o755), (run_folder / "worker.sock", 0o666)):
            path.chmod(mode)  # somebody was careless: the worker still looks who is there
        assert as_nobody(lambda: connect(worker.socket)) in ("ConnectionResetError", "BrokenPipeError")
    finally:
        for folder, mode in modes.items():
            folder.chmod(mode)


def test_all_that_left_is_on_record(worker):
    lines = list(AuditLog(worker.folder / ".panfm" / "state").lines())
    assert {line["kind"] for line in lines} == {"answer", "error"}
    assert {name for line in lines for name, _, _ in line["arrays"]} <= {
        "backbone", "head", "stream:brain-mr", "stream:heart-mr"
    }  # fmt: skip
