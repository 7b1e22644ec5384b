"""The worker at its socket: what may ask, what is answered, and that nothing ends it."""

import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from client.relay import ask
from panfm.cli import main
from panfm.cli.worker_command import supernode_command
from panfm.config import parse_run, parse_site
from panfm.errors import ConfigError
from panfm.json_log import JsonLines
from panfm.sharing.frames import Frame, Kind, address, encode
from panfm.sharing.messages import Handshake, Invitation, Records, RoundReply
from panfm.site import Site, handler
from panfm.site.audit_log import AuditLog
from panfm.site.worker import Worker, is_running, listen
from tests.cases import approve
from tests.unit.site.test_site import same, task


@pytest.fixture
def folder(tmp_path, write_site):
    return write_site(tmp_path / "alpha", "alpha", ("brain", "heart"))


@pytest.fixture
def serving(folder):
    """Ask from another thread, while the worker serves from this one, as limits on time need the main thread."""
    approve(folder, parse_run(task().run_toml))
    with listen(folder, Site(folder).config) as listener, ThreadPoolExecutor(1) as pool:
        worker, path = Worker(folder, listener), folder / ".panfm" / "run" / "worker.sock"

        def serve(frame: Frame) -> Frame:
            answer = pool.submit(ask, str(path), frame)
            worker.serve_one()
            return answer.result()

        yield SimpleNamespace(ask=serve, worker=worker, path=path)


def test_it_answers_as_the_site_itself(folder, serving, tmp_path):
    invitation = Invitation(task().run_toml)
    answer = serving.ask(Frame(Kind.HANDSHAKE, invitation.to_records()))
    assert Handshake.from_records(answer.records) == Site(folder).handshake(invitation)
    elsewhere = Site(folder, tmp_path / "elsewhere")
    for number in (1, 2, 2):
        answer = serving.ask(Frame(Kind.ROUND, task(number).to_records()))
        assert answer.kind is Kind.ANSWER
        assert same(RoundReply.from_records(answer.records), elsewhere.train_round(task(number)))
    kinds = [(line["kind"], line["round"]) for line in AuditLog(folder / ".panfm" / "state").lines()]
    assert kinds == [("answer", None), ("answer", 1), ("answer", 2), ("answer", 2)]


def test_a_round_of_a_model_that_cannot_be_built_is_answered(folder, serving):
    text = task().run_toml.replace('backbone = "dense"', 'backbone = "director-experts"')
    asked = replace(task(), run_toml=re.sub(r"active = \[\s*2,\s*\]", "active = [9]", text))
    approve(folder, parse_run(asked.run_toml))
    answer = serving.ask(Frame(Kind.ROUND, asked.to_records()))
    assert answer.kind is Kind.ERROR
    reason = answer.records.config["reason"]
    assert "model.experts.active: 9 in block 0, expected at most count = 8" in reason


def test_an_answer_is_one_line_of_the_log(folder, serving, caplog):
    caplog.set_level("INFO", "panfm.site.worker")
    serving.ask(Frame(Kind.HANDSHAKE, Invitation(task().run_toml).to_records()))
    answer = serving.ask(Frame(Kind.ROUND, task(1).to_records()))
    asked, trained = [record for record in caplog.records if record.name == "panfm.site.worker"]
    assert (asked.run, asked.round, trained.run, trained.round) == (None, None, task().run_id, 1)
    assert trained.numbers["bytes"] == len(encode(answer))
    line = json.loads(JsonLines().format(trained))
    assert (line["run"], line["round"], line["numbers"]) == (task().run_id, 1, trained.numbers)
    assert re.fullmatch(r"round: answer, \d+ bytes after [\d.]+ s", line["message"])


@pytest.mark.slow
def test_a_first_question_imports_no_plug_in(folder):
    """An import that a limit on time ends would leave half a module behind. A site without `training-labels` refuses a
    run that needs the objective of labels before it is imported."""
    script = (
        "import sys\nfrom panfm.config.site_description import LimitsConfig\nfrom panfm.site import worker\n"
        "worker.load_libraries(LimitsConfig(training_labels='all'))\nbefore = set(sys.modules)\n"
        "from panfm import registry\n"
        "tables = (registry.OBJECTIVES, registry.MASKING_POLICIES, registry.BACKBONES, registry.READERS)\n"
        "for table in tables:\n"
        "    for name in table.names:\n"
        "        loaded = table.load(name)\n"
        "        registry.import_class(getattr(loaded, 'implementation', loaded))\n"
        "print(sorted(name for name in set(sys.modules) - before if name.startswith('panfm')))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_cannot_be_written_down_does_not_leave(folder, serving, monkeypatch):
    monkeypatch.setattr("client.relay.ATTEMPTS", 1)
    (folder / ".panfm" / "state" / "departures.jsonl").mkdir(parents=True)
    with pytest.raises(ConnectionError):
        serving.ask(Frame(Kind.HANDSHAKE, Invitation(task().run_toml).to_records()))


@pytest.mark.parametrize("kind", [Kind.ANSWER, Kind.ERROR])
def test_it_answers_two_questions_only(serving, kind):
    reason = "site alpha: ProtocolError: {}: not a question, expected handshake, round or sums"
    assert serving.ask(Frame(kind, Records())) == Frame.error(reason.format(kind))


def test_errors_are_scrubbed_and_kept(folder, serving):
    (folder / "manifest.csv").unlink()
    answer = serving.ask(Frame(Kind.HANDSHAKE, Invitation(task().run_toml).to_records()))
    assert answer == Frame.error(
        "site alpha: DataError: this site's data or private state is faulty; its log tells more"
    )
    assert "manifest.csv" in (folder / ".panfm" / "state" / "site.log").read_text()


def test_other_accounts_are_hung_up_on_unread(serving):
    serving.worker._users = {os.getuid() + 1}
    with socket.socket(socket.AF_UNIX) as stranger, address(serving.path) as path:
        stranger.connect(path)
        stranger.sendall(encode(Frame(Kind.HANDSHAKE, Invitation(task().run_toml).to_records())))
        serving.worker.serve_one()
        with pytest.raises(ConnectionResetError):  # what it said lay there unread
            stranger.recv(1)
    assert not list(AuditLog(serving.worker.site.state_dir).lines())


def test_a_round_that_takes_too_long_is_given_up_and_the_next_one_counts(folder, serving, monkeypatch):
    real = Site.train_round
    monkeypatch.setattr(Site, "train_round", lambda self, task: threading.Event().wait(20.0))
    limited = parse_site('name = "alpha"\n[limits]\nseconds-per-round = 0.05\n')
    usual, serving.worker.site.config = serving.worker.site.config, limited
    reason = "site alpha: LimitError: took longer than this site's limits.seconds-per-round (0.05)"
    assert serving.ask(Frame(Kind.ROUND, task().to_records())) == Frame.error(reason)
    serving.worker.site.config = usual
    monkeypatch.setattr(Site, "train_round", real)
    assert serving.ask(Frame(Kind.ROUND, task().to_records())).kind is Kind.ANSWER


def test_an_experiment_that_the_operator_has_not_approved_is_refused(folder, serving):
    other = task(extra="weight-decay = 0.5\n")
    for frame in (
        Frame(Kind.HANDSHAKE, Invitation(other.run_toml).to_records()),
        Frame(Kind.ROUND, other.to_records()),
    ):
        answer = serving.ask(frame)
        assert answer.records.config["reason"].startswith("site alpha: PendingApprovalError: experiment ")
    assert not list((folder / ".panfm").rglob("*.npy"))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(100),
        b"PANFM/1\n" + b"\xff" * 16,
        encode(Frame(Kind.ROUND, Records({"a": np.ones(9, np.float32)})))[:-1],
        b"PANFM/1\n" + (1).to_bytes(8, "little") + bytes(8) + b"[",
    ],
)
def test_whatever_comes_the_worker_goes_on(serving, content):
    with socket.socket(socket.AF_UNIX) as stranger, address(serving.path) as path:
        stranger.connect(path)
        stranger.sendall(content)
        stranger.shutdown(socket.SHUT_WR)
        serving.worker.serve_one()
    assert serving.ask(Frame(Kind.HANDSHAKE, Invitation(task().run_toml).to_records())).kind is Kind.ANSWER


def test_the_socket_is_its_owners_alone(folder, serving):
    path = folder / ".panfm" / "run"
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path, path / "worker.sock")] == [0o700, 0o600]


def test_one_worker_per_site(folder, serving):
    site = Site(folder).config
    assert is_running(folder, site)
    with pytest.raises(ConfigError, match="another worker serves this site"), listen(folder, site):
        pass


def test_a_socket_left_behind_by_a_dead_worker_is_taken_over(folder):
    site = Site(folder).config
    for _ in range(2):
        with listen(folder, site) as listener:
            assert listener.getsockname().endswith("worker.sock")
        assert not is_running(folder, site)


def test_a_path_longer_than_a_sockets_address(tmp_path, write_site):
    folder = write_site(tmp_path / ("a-long-way-down/" * 9) / "alpha", "alpha", ("brain", "heart"))
    with listen(folder, Site(folder).config) as listener, ThreadPoolExecutor(1) as pool:
        path = folder / ".panfm" / "run" / "worker.sock"
        assert len(str(path)) > 140
        answer = pool.submit(ask, str(path), Frame(Kind.ANSWER, Records()))
        Worker(folder, listener).serve_one()
    assert answer.result().kind is Kind.ERROR


def test_start_is_careful_before_it_answers(folder, monkeypatch):
    """Files for its owner alone, memory bounded, and no other account in the site folder if Flower has one."""
    done, words = [], ["site", "start", str(folder)]
    monkeypatch.setattr(os, "umask", done.append)
    monkeypatch.setattr(handler, "limit_memory", done.append)
    monkeypatch.setattr(Worker, "serve_forever", lambda self: done.append("at work"))
    (folder / "site.toml").write_text('name = "alpha"\n[limits]\nmemory-gib = 1.5\n[worker]\nusers = ["65534"]\n')
    folder.chmod(0o755)
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 1
    assert refused.stderr == f"{folder}: open to every account, Flower's among them; expected: chmod o= {folder}\n"
    folder.chmod(0o750)
    done.clear()
    told = CliRunner().invoke(main, words)
    assert done == [0o077, 1.5, "at work"]
    assert told.stdout.splitlines()[1] == supernode_command(folder, Site(folder).config)
    assert not told.stderr
    (folder / "site.toml").write_text('name = "alpha"\n')
    unset = CliRunner().invoke(main, words)
    assert unset.stderr == "limits.memory-gib is not set: a run may fill all memory of this machine\n"


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ('users = ["nobody-of-this-name"]', r"worker\.users"),
        ('group = "no-group-of-this-name"', r"worker\.group"),
        ('socket = "site.toml/worker.sock"', "cannot be made"),
    ],
)
def test_what_cannot_be_listened_at_is_one_line(folder, extra, reason):
    folder.chmod(0o700)
    (folder / "site.toml").write_text(f'name = "alpha"\n[worker]\n{extra}\n')
    done = CliRunner().invoke(main, ["site", "start", str(folder)])
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert re.search(reason, done.stderr)
