"""A run of 20 rounds over real processes, with TLS and nginx, through outages of everything, and no hand on it.

Whatever ends is started again as its shipped unit says. The model has the bits of a run in one process with the same
attendance.
"""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import Context, Error, Message, RecordDict

from client.app import app as client_app
from panfm.config import dump_toml, load_run
from panfm.outputs import read_json_lines
from panfm.report.run_events import EventKind, read_events
from panfm.report.run_files import read_run
from server.app import app as server_app
from server.flower_cli import ROOT
from simulations.engines.deployment import CONNECTION, Deployment, approve
from simulations.engines.job import Job
from simulations.engines.local import LocalGrid
from simulations.engines.processes import Process, send_signal, wait_until
from tests.federation.conftest import HOLDINGS, Federation
from tests.federation.test_deployment import HOSTS, child_of, needs_nginx, start_nginx

pytestmark = [pytest.mark.slow, pytest.mark.long]
ROUNDS = 20
DOWN_S = 75.0
LONG_S = 900.0


def as_unit(name: str, command: list[str]) -> list[str]:
    """What systemd does with a shipped unit: start a command again when it ends, unless it is to stay ended."""
    text = (HOSTS / name).read_text(encoding="utf-8")
    seconds = re.search(r"^RestartSec=(\d+)$", text, re.MULTILINE)[1]
    if "\nRestart=always\n" in text:
        return ["bash", "-c", f'while :; do "$@"; sleep {seconds}; done', name, *command]
    final = re.search(r"^RestartPreventExitStatus=(\d+)$", text, re.MULTILINE)[1]
    script = f'while :; do "$@"; s=$?; [ $s = 0 ] || [ $s = {final} ] && exit $s; sleep {seconds}; done'
    return ["bash", "-c", script, name, *command]


class Operations:
    """A deployment under supervision, and what may go wrong in it."""

    def __init__(self, federation: Federation, deployment: Deployment) -> None:
        self.sites = {folder.name: folder for folder in sorted(federation.sites.iterdir())}
        self.deployment = deployment
        self.run_dir = federation.folder / "run"
        for folder in self.sites.values():
            deployment.start(
                f"{folder.name}.worker", *as_unit("panfm-worker.service", ["panfm", "site", "start", str(folder)])
            )
        deployment.start_coordinator()
        self.doors = {"beta": start_nginx(deployment)}
        for folder in self.sites.values():
            deployment.register(folder)
            self.start_supernode(folder.name)
        deployment.wait_for(list(self.sites.values()))

    def start_supernode(self, site: str) -> None:
        command = self.deployment.supernode(self.sites[site], address=self.doors.get(site, ""))
        self.deployment.start(f"{site}.supernode", *as_unit("panfm-supernode.service", command))

    def start_run(self, experiment: Path) -> None:
        """Start the run without watching it, then start its unit `panfm-run@`."""
        approve(self.sites.values(), load_run(experiment))
        words = ["start", str(experiment), "--connection", CONNECTION, "--out", str(self.run_dir), "--detach"]
        command = [sys.executable, "-m", "server"]
        subprocess.run([*command, *words], cwd=ROOT, env=self.deployment.environment, check=True)
        self.deployment.start("keep", *as_unit("panfm-run@.service", [*command, "keep", str(self.run_dir)]))

    @property
    def rounds(self) -> list[dict]:
        return read_json_lines(self.run_dir / "rounds.jsonl")

    def wait_for_rounds(self, more: int) -> None:
        goal = len(self.rounds) + more
        wait_until(lambda: len(self.rounds) >= goal, f"round {goal}", LONG_S, self.deployment.processes["keep"])

    def kill(self, role: str) -> None:
        """Kill the process of this role at every site."""
        for site in self.sites:
            os.kill(child_of(self.deployment.processes[f"{site}.{role}"]), signal.SIGKILL)

    def superlink_is_down(self) -> None:
        send_signal(self.deployment.processes["superlink"], signal.SIGKILL)
        time.sleep(DOWN_S)
        self.deployment.start_superlink()

    def kill_serverapp(self) -> None:
        [pid] = [pid for pid in descendants(self.deployment.processes["superexec"]) if is_serverapp(pid)]
        os.kill(pid, signal.SIGKILL)

    def fill_disk(self, site: str, *, is_full: bool) -> None:
        """Let every write to a file of the site's worker fail, as on a full disk."""
        size = 0 if is_full else resource.RLIM_INFINITY
        pid = child_of(self.deployment.processes[f"{site}.worker"])
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def descendants(process: Process) -> Iterator[int]:
    parents = [process.pid]
    while parents:
        parent = parents.pop()
        try:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split()
        except FileNotFoundError:
            continue
        parents += map(int, children)
        yield from map(int, children)


def is_serverapp(pid: int) -> bool:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return any(word.endswith(b"flwr-serverapp") or word == b"flwr-serverapp" for word in words[:3])


class SameAttendance(LocalGrid):
    """Sites that are online when they were asked before, and answer when they answered. Others that were asked may have
    trained; the reply was lost."""

    def __init__(self, lines: list[dict], job: Job) -> None:
        super().__init__(client_app, job.num_sites, job.run_config())
        self.lines = {line["round"]: line for line in lines}
        self.names = dict(zip(super().get_node_ids(), sorted(HOLDINGS), strict=True))
        self.rounds = job.run_dir / "rounds.jsonl"

    def get_node_ids(self):
        number = len(read_json_lines(self.rounds)) + 1
        asked = self.lines[number]["asked"] if number in self.lines else self.names.values()
        return [node for node, site in self.names.items() if site in asked]

    def _reply(self, message):
        site, group = self.names[message.metadata.dst_node_id], message.metadata.group_id
        if message.metadata.message_type != "train" or site in self.lines[int(group)]["sites"]:
            return super()._reply(message)
        later = [line["sites"] for number, line in self.lines.items() if number > int(group) and site in line["sites"]]
        if later and later[0][site]["state_round"] == int(group):
            super()._reply(message)
        return Message(Error(1000, "lost"), reply_to=message)


@needs_nginx
def test_a_run_that_nobody_looks_after(tmp_path, write_site):
    for name, organs in HOLDINGS.items():
        write_site(tmp_path / "sites" / name, name, organs)
    federation = Federation(tmp_path)
    overrides = (f"train.rounds={ROUNDS}", "federation.min-sites=2", "federation.round-timeout-s=300.0")
    experiment = tmp_path / "experiment.toml"
    experiment.write_text(dump_toml(federation.describe(*overrides)), encoding="utf-8")
    with Deployment(tmp_path / "home", tmp_path / "logs") as deployment:
        operations = Operations(federation, deployment)
        operations.start_run(experiment)
        operations.wait_for_rounds(1)
        operations.kill("worker")
        operations.wait_for_rounds(1)
        operations.superlink_is_down()
        operations.wait_for_rounds(1)
        operations.kill("supernode")
        operations.wait_for_rounds(2)
        operations.kill_serverapp()
        operations.wait_for_rounds(1)
        send_signal(deployment.processes["gamma.supernode"], signal.SIGKILL)
        wait_until(lambda: sum("gamma" not in line["sites"] for line in operations.rounds) >= 5, "5 rounds", LONG_S)
        operations.start_supernode("gamma")
        operations.fill_disk("beta", is_full=True)
        wait_until(lambda: sum("beta" in line["rejected"] for line in operations.rounds) >= 2, "2 rounds", LONG_S)
        operations.fill_disk("beta", is_full=False)
        operations.superlink_is_down()
        os.kill(child_of(deployment.processes["keep"]), signal.SIGKILL)
        operations.kill("worker")
        operations.kill("supernode")
        wait_until(lambda: deployment.processes["keep"].poll() is not None, "the end", LONG_S)
        assert deployment.processes["keep"].returncode == 0
    lines = operations.rounds
    assert [line["round"] for line in lines] == list(range(1, ROUNDS + 1))
    assert all(len(line["sites"]) >= 2 for line in lines)
    kinds = {event.kind for event in read_events(operations.run_dir)}
    assert {EventKind.STARTED, EventKind.RESUMED, EventKind.WAITING, EventKind.QUORUM} <= kinds
    assert {EventKind.LEFT_OUT, EventKind.BACK, EventKind.FINISHED} <= kinds
    assert read_run(operations.run_dir).state == "finished"
    job = federation.job("local", *overrides)
    server_app(SameAttendance(lines, job), Context(1, 1, {}, RecordDict(), job.run_config()))
    model = "model/model.safetensors"
    assert (operations.run_dir / model).read_bytes() == (job.run_dir / model).read_bytes()
