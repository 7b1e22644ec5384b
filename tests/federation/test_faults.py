"""What sites, disks and clocks may do wrong, by wrappers around the real ClientApp.

Each fault ends in a logged rejection and a finished run, and a refused reply leaves no trace in the model.
"""

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from flwr.app import Array, Context, RecordDict
from flwr.clientapp import ClientApp

from client.app import app as client_app
from panfm.errors import DataError, RunError
from panfm.site import resident_site
from server.app import app as server_app
from simulations.engines.job import Job
from simulations.engines.local import LocalGrid, run_apps
from simulations.engines.local import run as run_local
from tests.federation.conftest import HOLDINGS, Federation

BETA = 1
pytestmark = pytest.mark.slow


def with_four_sites(folder: Path, write_site: Callable[..., Path]) -> Federation:
    for name, organs in (HOLDINGS | {"delta": ("heart", "liver")}).items():
        write_site(folder / "sites" / name, name, organs)
    return Federation(folder)


@pytest.fixture
def four_sites(tmp_path, write_site):
    return with_four_sites(tmp_path, write_site)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, write_site) -> bytes:
    """The model of a run without a fault."""
    return model(with_four_sites(tmp_path_factory.mktemp("undisturbed"), write_site).run("whole"))


@pytest.fixture(scope="module")
def without_a_reply(tmp_path_factory, write_site) -> bytes:
    """The model of a run that lost beta's reply of round 2."""
    return model(run_with(with_four_sites(tmp_path_factory.mktemp("without"), write_site), "lost", lost))


class Faulty(ClientApp):
    """The real ClientApp, with a hand in beta's reply of round 2."""

    def __init__(self, fault: Callable) -> None:
        super().__init__()
        self.fault = fault

    def __call__(self, message, context):
        reply = client_app(message, context)
        is_beta = context.node_config["partition-id"] == BETA
        return self.fault(reply) if is_beta and message.metadata.group_id == "2" else reply


def on_updates(change: Callable[[np.ndarray], np.ndarray]) -> Callable:
    def fault(reply):
        arrays = reply.content.array_records["arrays"]
        for name in list(arrays):
            arrays[name] = Array(change(arrays[name].numpy()))
        return reply

    return fault


def missing_key(reply):
    del reply.content.array_records["arrays"]["backbone"]
    return reply


def extra_key(reply):
    reply.content.array_records["arrays"]["teacher"] = Array(np.zeros(3, np.float32))
    return reply


def stale_round(reply):
    reply.content.config_records["config"]["round"] = 1
    return reply


def lost(reply):
    raise RuntimeError("the reply is lost")


FAULTS = {
    "NaN": (on_updates(lambda update: update * np.float32("nan")), "update holds NaN"),
    "x1000": (on_updates(lambda update: update * np.float32(1000)), r"norm|beyond 64"),
    "shape": (on_updates(lambda update: update[:-1]), "expected float32"),
    "missing": (missing_key, r"missing \['backbone'\]"),
    "extra": (extra_key, r"not expected \['teacher'\]"),
    "stale": (stale_round, "answers round 1"),
    "raises": (lost, "the reply is lost"),
}


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]


def model(run_dir: Path) -> bytes:
    return (run_dir / "model" / "model.safetensors").read_bytes()


def distance(one: bytes, other: bytes) -> float:
    first, second = safetensors.numpy.load(one), safetensors.numpy.load(other)
    return float(np.sqrt(sum(np.square(first[name] - second[name]).sum() for name in first)))


def run_with(federation, name: str, fault: Callable, *overrides: str) -> Path:
    job = federation.job(name, *overrides)
    run_apps(server_app, Faulty(fault), job)
    return job.run_dir


def test_every_bad_reply_is_as_if_it_had_been_lost(four_sites, without_a_reply, caplog):
    for name, (fault, why) in FAULTS.items():
        caplog.clear()
        run_dir = run_with(four_sites, name, fault)
        assert [list(line["rejected"]) for line in lines(run_dir)] == [[], ["beta"], []], name
        with pytest.raises(AssertionError, match=why):
            raise AssertionError(lines(run_dir)[1]["rejected"]["beta"])
        assert "round 2: beta left out: " in caplog.text, name
        assert model(run_dir) == without_a_reply, name


def test_a_flipped_sign_is_seen_where_sites_agree(four_sites):
    """The images here are noise, so the sites agree on little: twelve local steps are needed, and a close limit."""
    overrides = ("train.local-steps=12", "train.rounds=2", "sharing.guards.direction=0.15")
    run_dir = run_with(four_sites, "flipped", on_updates(lambda update: -update), *overrides)
    assert [list(line["rejected"]) for line in lines(run_dir)] == [[], ["beta"]]
    assert "points elsewhere: cosine -0" in lines(run_dir)[1]["rejected"]["beta"]
    assert model(run_dir) == model(run_with(four_sites, "lost", lost, *overrides))


def test_a_lost_reply_moves_the_model_less_than_a_site_that_never_came(four_sites, undisturbed, without_a_reply):
    """The spread of runs without a fault: all four sites, or any three of them."""
    spread = []
    for site in ("alpha", "beta", "delta", "gamma"):
        away = four_sites.sites / site
        away.rename(four_sites.folder / site)
        spread.append(distance(undisturbed, model(four_sites.run(f"without-{site}"))))
        (four_sites.folder / site).rename(away)
    assert 0 < distance(undisturbed, without_a_reply) < max(spread)


class Hangs(LocalGrid):
    """Beta works on round 2 until round 3 has begun."""

    def push_messages(self, messages):
        names = super().push_messages(messages)
        for name in names:
            message = self._pending[name]
            late = [key for key, each in self._pending.items() if self._is_beta(each, "2")]
            if self._is_beta(message, "3") and late:
                self._reply(self._pending.pop(late[0]))
        return names

    def pull_messages(self, message_ids):
        return super().pull_messages(name for name in message_ids if not self._is_beta(self._pending.get(name), "2"))

    def _is_beta(self, message, round_number: str) -> bool:
        asked = message.metadata if message else None
        return bool(asked) and (asked.dst_node_id, asked.group_id) == (2 + BETA, round_number)


def test_a_late_reply_is_dropped_and_the_site_is_back_next_round(four_sites, without_a_reply, monkeypatch, caplog):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr("server.exchange.time", clock)
    job = four_sites.job("hangs")
    grid = Hangs(client_app, job.num_sites, job.run_config())
    server_app(grid, Context(1, 1, {}, RecordDict(), dict(job.run_config())))
    assert [line["late"] for line in lines(job.run_dir)] == [[], ["beta"], []]
    assert "round 2: beta left out: no reply within 3600 s" in caplog.text
    assert lines(job.run_dir)[2]["sites"]["beta"]["state_round"] == 2
    assert model(job.run_dir) == without_a_reply


class Wedged(LocalGrid):
    """Beta's SuperNode waits for good from round 2 on: it is online and never answers. It is started again after
    round 5 (and has lost its messages)."""

    def __init__(self, job: Job) -> None:
        super().__init__(client_app, job.num_sites, job.run_config())
        self.rounds = job.run_dir / "rounds.jsonl"

    def pull_messages(self, message_ids):
        done = len(self.rounds.read_text().splitlines())
        waits = {name for name, each in self._pending.items() if each.metadata.dst_node_id == 2 + BETA}
        return super().pull_messages(name for name in message_ids if not 1 <= done < 5 or name not in waits)


def test_a_site_that_is_online_but_silent_holds_up_two_rounds_and_no_more(four_sites, monkeypatch, caplog):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    for module in ("server.exchange", "server.round_attempt"):
        monkeypatch.setattr(f"{module}.time", clock)
    job = four_sites.job("wedged", "train.rounds=7")
    server_app(Wedged(job), Context(1, 1, {}, RecordDict(), dict(job.run_config())))
    told = lines(job.run_dir)
    assert [line["late"] for line in told] == [[], ["beta"], ["beta"], [], [], [], []]
    assert [line["seconds"] > 3600 for line in told] == [False, True, True, False, False, False, False]
    why = "silent: no reply by the deadline of rounds 2, 3; not asked until it answers an invitation"
    assert [line["away"] for line in told] == [{}, {}, {}, {"beta": why}, {"beta": why}, {}, {}]
    assert ["beta" in line["sites"] for line in told] == [True, False, False, False, False, True, True]
    assert f"round 3: beta is online but {why}" in caplog.text
    assert f"{why}</td>" in (job.run_dir / "status.html").read_text()
    assert model(job.run_dir)


def full_disk(monkeypatch, folder: Path, name: str) -> None:
    """Nothing more can be written to a file of this name under a folder."""
    real = os.fsync

    def fsync(handle):
        path = str(Path(f"/proc/self/fd/{handle}").readlink())
        if path.startswith(str(folder)) and name in path:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr("panfm.files.os.fsync", fsync)


def test_a_full_disk_at_a_site(four_sites, monkeypatch):
    """The round is lost for it; it goes on from the state of the round before."""
    job = four_sites.job("full")
    full_disk(monkeypatch, job.run_dir / "sites" / "beta", "round-000002")
    run_local(job)
    assert [line["rejected"] for line in lines(job.run_dir)] == [{}, {"beta": "internal error (OSError)"}, {}]
    assert lines(job.run_dir)[2]["sites"]["beta"]["state_round"] == 1


def test_a_full_disk_at_the_server(four_sites, undisturbed, monkeypatch):
    """The run stops with one line, and goes on to the same bits when there is space."""
    job = four_sites.job("full")
    with monkeypatch.context() as patch:
        full_disk(patch, job.run_dir / "checkpoint", "round-000002")
        with pytest.raises(RunError, match=r"round-000002.state: cannot be written \(No space left on device\)"):
            run_local(job)
    run_local(job)
    assert model(job.run_dir) == undisturbed


class StopsIn3(ClientApp):
    def __init__(self) -> None:
        super().__init__()

    def __call__(self, message, context):
        if message.metadata.group_id == "3":
            raise KeyboardInterrupt
        return client_app(message, context)


def stop_after_round_2(four_sites) -> Path:
    job = four_sites.job("stopped")
    with pytest.raises(KeyboardInterrupt):
        run_apps(server_app, StopsIn3(), job)
    resident_site.cache_clear()
    return job.run_dir


def test_a_truncated_state_file_of_a_site(four_sites):
    """The site stops, and its log names the file; deleted, the site goes on from the round before."""
    run_dir = stop_after_round_2(four_sites)
    [state] = (run_dir / "sites" / "beta").glob("runs/*/round-000002.state")
    state.write_bytes(state.read_bytes()[:-100])
    run_local(Job(four_sites.sites, run_dir))
    assert lines(run_dir)[2]["rejected"]["beta"].startswith("DataError: this site's data or private state is faulty")
    assert "round-000002.state: corrupted" in (run_dir / "sites" / "beta" / "site.log").read_text()


def test_a_truncated_checkpoint(four_sites, undisturbed):
    """The server stops and names the file; deleted, the run goes on from the round before to the same bits."""
    run_dir = stop_after_round_2(four_sites)
    checkpoint = run_dir / "checkpoint" / "round-000002.state"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"round-000002.state: corrupted"):
        run_local(Job(four_sites.sites, run_dir))
    checkpoint.unlink()
    run_local(Job(four_sites.sites, run_dir))
    assert model(run_dir) == undisturbed


@pytest.mark.parametrize("jump_s", [86_400.0, -86_400.0])
def test_a_clock_that_jumps(four_sites, undisturbed, monkeypatch, jump_s):
    """The wall clock is moved by a day in the middle of round 2."""
    real, jumped = time.time, []

    def jump(reply):
        jumped.append(True)
        return reply

    monkeypatch.setattr("time.time", lambda: real() + jump_s * len(jumped))
    run_dir = run_with(four_sites, "jumps", jump)
    assert [line["rejected"] for line in lines(run_dir)] == [{}, {}, {}]
    assert model(run_dir) == undisturbed


@pytest.mark.parametrize("coding", ["float32", "int8"])
def test_a_site_that_was_away_for_five_rounds_comes_back(four_sites, coding):
    """It goes on from its own last state and the server's parameters; the run is as repeatable as any."""

    class Away(ClientApp):
        def __init__(self) -> None:
            super().__init__()

        def __call__(self, message, context):
            if context.node_config["partition-id"] == BETA and 2 <= int(message.metadata.group_id) <= 6:
                raise ConnectionError("away")
            return client_app(message, context)

    found = []
    for name in ("first", "second"):
        job = four_sites.job(name, "train.rounds=8", f"sharing.coding={coding}")
        run_apps(server_app, Away(), job)
        found.append(model(job.run_dir))
        assert [line["sites"].get("beta", {}).get("state_round") for line in lines(job.run_dir)] == [
            0, None, None, None, None, None, 1, 7,
        ]  # fmt: skip
    assert found[0] == found[1]
