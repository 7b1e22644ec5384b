"""A real deployment that loses its SuperLink for 75 s, and then a SuperNode that the quorum needs."""

import os
import signal
import time

import pytest

from panfm.outputs import read_json_lines
from panfm.report.run_events import EventKind, read_events
from panfm.report.run_progress import read_progress
from simulations.engines.deployment import CONNECTION, Deployment
from simulations.engines.flower import wait_for_end
from simulations.engines.processes import send_signal, wait_until
from tests.federation.conftest import HOLDINGS, Federation
from tests.federation.test_deployment import LONG_S, begin, child_of, supervised

pytestmark = [pytest.mark.slow, pytest.mark.long]
DOWN_S = 75.0


def test_an_outage_of_the_superlink_and_a_lost_quorum_are_waited_for(tmp_path, write_site):
    for name, organs in HOLDINGS.items():
        write_site(tmp_path / "sites" / name, name, organs)
    federation = Federation(tmp_path)
    overrides = ("train.rounds=8", "federation.min-sites=3")
    folders = sorted(federation.sites.iterdir())
    with Deployment(tmp_path / "home", tmp_path / "logs") as deployment:
        for folder in folders:
            deployment.start_worker(folder)
        deployment.start_coordinator()
        for folder in folders:
            deployment.register(folder)
            deployment.start(f"{folder.name}.supernode", *supervised(deployment.supernode(folder)))
        deployment.wait_for(folders)
        job = federation.job("run", *overrides)
        rounds = job.run_dir / "rounds.jsonl"
        run_id = begin(federation, deployment, job)
        wait_until(lambda: len(read_json_lines(rounds)) >= 2, "round 2", LONG_S)
        send_signal(deployment.processes["superlink"], signal.SIGKILL)
        time.sleep(DOWN_S)
        deployment.start_superlink()
        done = len(read_json_lines(rounds))
        wait_until(lambda: len(read_json_lines(rounds)) >= done + 1, "a round after the outage", LONG_S)
        os.kill(child_of(deployment.processes["gamma.supernode"]), signal.SIGKILL)
        wait_for_end(run_id, CONNECTION, job, deployment.environment)
    lines = read_json_lines(rounds)
    assert [(line["round"], sorted(line["sites"])) for line in lines] == [(n, sorted(HOLDINGS)) for n in range(1, 9)]
    kinds = [event.kind for event in read_events(job.run_dir)]
    assert kinds.count(EventKind.STARTED) == kinds.count(EventKind.FINISHED) == 1
    assert {EventKind.WAITING, EventKind.QUORUM} <= set(kinds)
    assert EventKind.RESUMED not in kinds
    assert read_progress(job.run_dir).step == "round 8"
    expected, model = federation.run("local", *overrides), "model/model.safetensors"
    assert (job.run_dir / model).read_bytes() == (expected / model).read_bytes()
