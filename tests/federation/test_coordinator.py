"""`python -m server` as its page tells it, against a real federation on loopback, over TLS with authentication."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from panfm.config import dump_toml
from panfm.report.run_files import read_run
from simulations.engines.deployment import CONNECTION, Deployment, approve, deployed
from simulations.engines.processes import wait_until
from tests.federation.conftest import HOLDINGS, Federation

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
LONG_S = 900.0


@pytest.fixture(scope="module")
def federation(tmp_path_factory, write_site) -> Federation:
    folder = tmp_path_factory.mktemp("coordinator")
    for name, organs in HOLDINGS.items():
        write_site(folder / "sites" / name, name, organs)
    return Federation(folder)


@pytest.fixture(scope="module")
def deployment(federation):
    with deployed(sorted(federation.sites.iterdir()), federation.folder / "logs") as deployment:
        yield deployment


@pytest.fixture(scope="module")
def tool(deployment):
    """Calls `python -m server`: exit status, what it says, why not."""
    environment = os.environ | deployment.environment

    def call(*words: object) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "server", *map(str, words)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=LONG_S
        )
        return done.returncode, done.stdout, done.stderr

    return call


@contextmanager
def held_up(deployment: Deployment, site: str) -> Iterator[None]:
    """Meanwhile a site's worker stands still, and the round with it."""
    group = deployment.processes[f"{site}.worker"].pid
    os.killpg(group, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(group, signal.SIGCONT)


def experiment(federation, *overrides: str) -> Path:
    path = federation.folder / "experiment.toml"
    run = federation.describe("federation.min-sites=3", *overrides)
    path.write_text(dump_toml(run))
    approve(sorted(federation.sites.iterdir()), run)
    return path


def test_a_run_that_is_stopped_and_resumed_has_the_bits_of_an_undisturbed_one(federation, deployment, tool):
    expected = federation.run("local", "federation.min-sites=3", "train.rounds=4")
    run, path = federation.folder / "run", experiment(federation, "train.rounds=4")
    code, told, why = tool("start", path, "--connection", CONNECTION, "--out", run, "--detach")
    assert (code, why) == (0, "")
    assert told.startswith(f"{run}: Flower's run ")
    wait_until(lambda: len(read_run(run).rounds) >= 1, "round 1", LONG_S)
    with held_up(deployment, "beta"):
        code, told, why = tool("status", run)
        assert (code, why) == (0, "")
        assert "of 4 rounds, running" in told
        assert "alpha" in told
        assert "is running" in tool("resume", run)[2]
        code, told, why = tool("stop", run)
        assert (code, why) == (0, "")
        assert f"{run}: stopped after " in told
    code, told, why = tool("status", run)
    assert code == 1
    assert ": stopped after " in why
    assert "by the coordinator" in (run / "status.html").read_text()
    assert not (run / "model").exists()
    assert tool("stop", run)[0] == 1

    code, told, why = tool("resume", run)
    assert (code, why) == (0, "")
    assert "round 4/4" in told
    assert told.endswith(f"{run}: finished; model: {run / 'model'}\n")
    assert tool("status", run)[0] == tool("watch", run)[0] == 0
    assert [line["round"] for line in read_run(run).rounds] == [1, 2, 3, 4]
    model = "model/model.safetensors"
    assert (run / model).read_bytes() == (expected / model).read_bytes()


def test_a_run_that_fails_ends_with_1_and_says_why(federation, tool):
    """Flower's own command line exits with 0."""
    run, words = (
        federation.folder / "failed",
        [f"--set=federation.{word}" for word in ("min-sites=4", "join-timeout-s=5.0", "wait-for-quorum-s=0")],
    )
    code, _, why = tool("start", experiment(federation), "--connection", CONNECTION, "--out", run, *words)
    assert code == 1
    assert why == f"{run}: failed after 0 of 3 rounds: 3 of at least 4 sites online after 5 s\n"
    assert tool("watch", run)[::2] == (1, why)
    assert "failed: 3 of at least 4 sites online" in (run / "status.html").read_text()
