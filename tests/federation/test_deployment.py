"""A real deployment on loopback: SuperLink, SuperNodes and workers as processes, over TLS with authentication."""

import os
import signal
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from panfm.site import Site
from panfm.site.departures import Departures
from simulations.engines.deployment import CONNECTION, credentials, deployed, run_config
from simulations.engines.flwr import submit, wait_for_end, whole_rounds
from simulations.engines.processes import send_signal, wait_until
from tests.federation.conftest import HOLDINGS, Federation

pytestmark = pytest.mark.slow
LONG_S = 300.0


@pytest.fixture(scope="module")
def federation(tmp_path_factory, write_site) -> Federation:
    folder = tmp_path_factory.mktemp("deployment")
    for name, organs in HOLDINGS.items():
        write_site(folder / "sites" / name, name, organs)
    return Federation(folder)


@pytest.fixture(scope="module")
def deployment(federation):
    folders = sorted(federation.sites.iterdir())
    with deployed(folders, federation.folder / "logs") as deployment:
        yield deployment


def connections(path: Path) -> int:
    """Ends of a Unix socket that the kernel knows, the listening one among them."""
    lines = Path("/proc/net/unix").read_text(encoding="utf-8").splitlines()
    return sum(line.endswith(f" {path}") for line in lines)


def test_a_run_with_a_worker_and_the_superlink_killed_gives_the_bits_of_the_local_engine(federation, deployment):
    expected = federation.run("local", "train.rounds=3", "federation.min-sites=3")
    job = federation.job("run", "train.rounds=3", "federation.min-sites=3")
    beta, rounds = federation.sites / "beta", job.run_dir / "rounds.jsonl"
    run_id = submit(CONNECTION, run_config(job), deployment.environment)
    wait_until(lambda: len(whole_rounds(rounds)) >= 1, "round 1", LONG_S)
    os.killpg(deployment.processes["beta.worker"].pid, signal.SIGSTOP)  # round 2 finds it, and waits
    wait_until(lambda: connections(beta / ".panfm" / "run" / "worker.sock") > 1, "beta is asked", LONG_S)
    send_signal(deployment.processes["beta.worker"], signal.SIGKILL)
    deployment.start_worker(beta)
    wait_until(lambda: len(whole_rounds(rounds)) >= 2, "round 2", LONG_S)
    send_signal(deployment.processes["superlink"], signal.SIGKILL)
    deployment.start_superlink()
    wait_for_end(run_id, CONNECTION, job, deployment.environment)
    assert [line["rejected"] for line in whole_rounds(rounds)] == [{}, {}, {}]
    model = "model/model.safetensors"
    assert (job.run_dir / model).read_bytes() == (expected / model).read_bytes()
    for name in HOLDINGS:
        lines = list(Departures(Site(federation.sites / name).state_dir).lines())
        assert [line["round"] for line in lines] == [None, 1, 2, 3]


def test_nobody_else_gets_in(federation, deployment):
    """Another authority's certificate, a key that nobody registered, plain text: each ends, none comes online."""
    others = federation.folder / "other-authority"
    credentials("coordinator", others, "127.0.0.1")
    credentials("site", others, "stranger")
    alpha, own = federation.sites / "alpha", deployment.home / "alpha"
    foreign = ["--root-certificates", str(others / "ca.crt")]
    doors = {
        "unregistered": (others / "stranger", None, "Failed to activate"),
        "other-authority": (own, foreign, "CERTIFICATE_VERIFY_FAILED"),
        "plain-text": (own, ["--insecure"], "Insecure connection is enabled"),
    }
    for name, (key, trust, _) in doors.items():
        deployment.start_supernode(alpha, name=name, key=key, trust=trust)
    for name, (*_, reason) in doors.items():
        process = deployment.processes[name]
        assert process.wait(timeout=LONG_S) != 0, name
        assert reason in (deployment.logs / f"{name}.log").read_text(encoding="utf-8"), name
    assert deployment.num_online() == len(HOLDINGS)


@pytest.mark.parametrize(
    ("route", "status"), [("runtime/acquire-task", 401), ("fleet/pull-messages", 401), ("fleet/activate-node", 401)]
)
def test_a_stranger_at_the_routes_is_turned_away(deployment, route, status):
    context = ssl.create_default_context(cafile=deployment.home / "ca.crt")
    request = urllib.request.Request(f"https://{deployment.address}/v1/{route}", data=b"", method="POST")
    request.add_header("Content-Type", "application/protobuf")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30, context=context)
    caught.value.close()
    assert caught.value.code == status
