"""A run of 20 rounds over real processes, with TLS and nginx, through outages of everything, and no hand on it.

Whatever ends is started again as its shipped unit says. The model has the bits of a run in one process with the same
attendance; history, metrics and a webhook tell of each outage, once.
"""

import http.server
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from flwr.app import Context, Error, Message, RecordDict

from client.app import app as client_app
from panfm.config import dump_toml, load_run
from panfm.outputs import read_json_lines
from panfm.report.run_events import Event, EventKind, read_events
from panfm.report.run_files import read_run
from server.app import app as server_app
from server.flower_cli import ROOT
from server.metrics import metrics_text
from simulations.engines.deployment import CONNECTION, Deployment, approve
from simulations.engines.job import Job
from simulations.engines.local import LocalGrid
from simulations.engines.processes import Process, send_signal, wait_until
from tests.federation.conftest import HOLDINGS, Federation
from tests.federation.test_deployment import HOSTS, child_of, freeze_until_asked, needs_nginx, start_nginx

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
        words += ["--alerts", str(experiment.with_name("alerts.toml"))]
        command = [sys.executable, "-m", "server"]
        subprocess.run([*command, *words], cwd=ROOT, env=self.deployment.environment, check=True)
        self.deployment.start("keep", *as_unit("panfm-run@.service", [*command, "keep", str(self.run_dir)]))

    @property
    def rounds(self) -> list[dict]:
        return read_json_lines(self.run_dir / "rounds.jsonl")

    def wait_for_rounds(self, more: int) -> None:
        goal = len(self.rounds) + more
        wait_until(lambda: len(self.rounds) >= goal, f"round {goal}", LONG_S, self.deployment.processes["keep"])

    def kill_supernodes(self) -> None:
        """Kill the SuperNode of every site."""
        for site in self.sites:
            os.kill(child_of(self.deployment.processes[f"{site}.supernode"]), signal.SIGKILL)

    def kill_workers(self) -> None:
        """Kill the worker of every site once it is asked."""
        workers = {child_of(self.deployment.processes[f"{site}.worker"]): folder for site, folder in self.sites.items()}
        freeze_until_asked(workers)
        for pid in workers:
            os.kill(pid, signal.SIGKILL)

    def answers_again(self, site: str) -> bool:
        """Whether a site's reply was taken in the last round."""
        return site in self.rounds[-1]["sites"]

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


class Webhook(http.server.BaseHTTPRequestHandler):
    """Keeps what is posted."""

    def do_POST(self) -> None:
        self.server.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def webhook(alerts: Path) -> Iterator[list[dict]]:
    """A server that alerts are posted to, and the file of alerts that names it; yields what it has got."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Webhook) as local:
        local.got = []
        alerts.write_text(f'[webhook]\nurl = "http://127.0.0.1:{local.server_port}/"\n', encoding="utf-8")
        thread = threading.Thread(target=local.serve_forever)
        thread.start()
        yield local.got
        local.shutdown()
        thread.join()


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


def now() -> str:
    """The time as the history has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@needs_nginx
def test_a_run_that_nobody_looks_after(tmp_path, write_site):
    for name, organs in HOLDINGS.items():
        write_site(tmp_path / "sites" / name, name, organs)
    federation = Federation(tmp_path)
    overrides = (f"train.rounds={ROUNDS}", "federation.min-sites=2", "federation.round-timeout-s=300.0")
    experiment = tmp_path / "experiment.toml"
    experiment.write_text(dump_toml(federation.describe(*overrides)), encoding="utf-8")
    with (
        webhook(tmp_path / "alerts.toml") as alerts,
        Deployment(tmp_path / "home", tmp_path / "logs") as deployment,
    ):
        operations = Operations(federation, deployment)
        operations.start_run(experiment)
        times = go_through(operations)
        wait_until(lambda: deployment.processes["keep"].poll() is not None, "the end", LONG_S)
        assert deployment.processes["keep"].returncode == 0
    lines = operations.rounds
    assert [line["round"] for line in lines] == list(range(1, ROUNDS + 1))
    assert all(len(line["sites"]) >= 2 for line in lines)
    events = read_events(operations.run_dir)
    check_history(events, times)
    check_told(operations.run_dir, events, alerts)
    job = federation.job("local", *overrides)
    server_app(SameAttendance(lines, job), Context(1, 1, {}, RecordDict(), job.run_config()))
    model = "model/model.safetensors"
    assert (operations.run_dir / model).read_bytes() == (job.run_dir / model).read_bytes()


def go_through(operations: Operations) -> dict[str, str]:
    """Let everything happen; return when each thing did."""
    times, deployment = {}, operations.deployment
    operations.wait_for_rounds(1)
    operations.kill_workers()
    operations.wait_for_rounds(1)
    operations.superlink_is_down()
    operations.wait_for_rounds(1)
    times["supernodes"] = now()
    operations.kill_supernodes()
    operations.wait_for_rounds(2)
    operations.kill_serverapp()
    operations.wait_for_rounds(1)
    times["away"] = now()
    send_signal(deployment.processes["gamma.supernode"], signal.SIGKILL)
    wait_until(lambda: sum("gamma" not in line["sites"] for line in operations.rounds) >= 5, "5 rounds", LONG_S)
    operations.start_supernode("gamma")
    wait_until(lambda: operations.answers_again("gamma"), "gamma", LONG_S)
    times["full"] = now()
    operations.fill_disk("beta", is_full=True)
    wait_until(lambda: sum("beta" in line["rejected"] for line in operations.rounds) >= 2, "2 rounds", LONG_S)
    operations.fill_disk("beta", is_full=False)
    wait_until(lambda: operations.answers_again("beta"), "beta", LONG_S)
    times["over"] = now()
    operations.superlink_is_down()
    os.kill(child_of(deployment.processes["keep"]), signal.SIGKILL)
    operations.wait_for_rounds(1)
    operations.kill_workers()
    operations.wait_for_rounds(1)
    times["supernodes again"] = now()
    operations.kill_supernodes()
    return times


def check_history(events: list[Event], times: dict[str, str]) -> None:
    """Each thing that happened is one event, and its end is one more."""

    def told(begin: str, end: str, *kinds: EventKind) -> list[tuple[EventKind, str | None]]:
        return [(one.kind, one.site) for one in events if begin <= one.time < end and one.kind in kinds]

    counts = Counter(event.kind for event in events)
    assert [counts[kind] for kind in (EventKind.STARTED, EventKind.FINISHED)] == [1, 1]
    assert [counts[kind] for kind in (EventKind.FAILED, EventKind.RESUMED)] == [1, 1]
    [killed] = [event for event in events if event.kind == EventKind.FAILED]
    assert killed.words == "the server was killed, or its machine went down"
    levels = [event.details["level"] for event in events if event.kind == EventKind.SUPERLINK]
    assert levels == ["down", None, "down", None]
    lost = Counter(event.site for event in events if event.kind == EventKind.WORKER_LOST)
    assert lost == dict.fromkeys(HOLDINGS, 2)
    for begin, end in (("supernodes", times["away"]), ("supernodes again", "9999")):
        assert told(times[begin], end, EventKind.WAITING, EventKind.QUORUM) == [
            (EventKind.WAITING, None),
            (EventKind.QUORUM, None),
        ]
    missing = (EventKind.LEFT_OUT, EventKind.AWAY)
    [(_, site)] = told(times["away"], times["full"], *missing)
    assert site == "gamma"
    assert told(times["full"], times["over"], *missing) == [(EventKind.LEFT_OUT, "beta")]
    for site in HOLDINGS:
        states = [event.kind for event in events if event.site == site and event.kind in (*missing, EventKind.BACK)]
        assert set(states[::2]) <= {*missing}, states
        assert set(states[1::2]) <= {EventKind.BACK}, states
        assert len(states) % 2 == 0, states


def check_told(run_dir: Path, events: list[Event], alerts: list[dict]) -> None:
    """Every event is counted in the metrics and was sent once."""
    run = read_run(run_dir)
    assert run.state == "finished"
    text = metrics_text(run)
    for kind, count in Counter(event.kind for event in events).items():
        assert f'panfm_run_events_total{{run="small",kind="{kind.value}"}} {count}\n' in text
    assert sorted(alert["number"] for alert in alerts) == list(range(1, len(events) + 1))
    assert all(Event.model_validate(alert["event"]) == events[alert["number"] - 1] for alert in alerts)
    assert Counter(line["state"] for line in read_json_lines(run_dir / "alerts.jsonl")) == {"sent": len(events)}
