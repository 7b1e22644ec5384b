"""CPU seconds per message to a hospital, with the resident worker and without it.

A real SuperLink and two SuperNodes on this machine, over TLS with authentication. Every round each site gets a round's
task of the federation's model, with the smallest local step there is: one patient. Three ClientApps answer:

    echo      returns what it was sent: Flower's floor
    worker    ours: relays to the site's resident worker (`panfm site start`), which trains the round
    plain     imports torch and trains the same round in its own process, which Flower starts anew for every message

Counted is the CPU time, user and system, of all processes in the sessions of both SuperNodes (flower-supernode, its
flower-superexec, and every flwr-clientapp, those that ended included) and of both workers, between the ends of rounds,
over the messages answered in between. The coordinator's processes are not counted. Each run's first round warms up.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from panfm.config import RunConfig, dump_toml
from panfm.errors import RunError
from panfm.outputs import read_json_lines
from server.flower_cli import ROOT, submit
from simulations.cohorts.prepare import load_simulation, prepare_cohort
from simulations.engines.deployment import CONNECTION, Deployment, approve, deployed
from simulations.engines.processes import wait_until
from simulations.harness import bench
from simulations.study_result import StudyResult

ARMS = {"echo": "overhead_apps.echo:app", "worker": "client.app:app", "plain": "overhead_apps.plain:app"}
_EXPERIMENT = ROOT / "configs" / "deployment" / "federation.toml"
_OVERRIDES = ("train.local-steps=1", "train.batch-size=1", "train.validate-every=1000000", "sharing.rule=plain")
_NUM_SITES = 2
_RUN_TIMEOUT_S = 900.0
_APP = """\
[project]
name = "overhead"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "panfm"

[tool.flwr.app.components]
serverapp = "overhead_apps.server:app"
clientapp = "{clientapp}"

[tool.flwr.app.config]
run-dir = ""
"""


@bench
def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per run, after one to warm up.")] = 6,
    repeats: Annotated[int, typer.Option(min=1, help="Runs per arm; the arms take turns.")] = 2,
) -> StudyResult:
    """CPU seconds per message of a real deployment: ours against torch in the ClientApp, and against Flower's floor."""
    console = Console(soft_wrap=True, highlight=False)
    run = load_simulation(_EXPERIMENT, [*_OVERRIDES, f"train.rounds={rounds + 1}"])
    cohort = prepare_cohort(run, console)
    result = StudyResult("deployment-overhead", {"rounds": rounds, "repeats": repeats}, unit="CPU s per message")
    with tempfile.TemporaryDirectory(prefix="panfm-overhead-") as name:
        home = Path(name)
        folders = [home / "sites" / site.name for site in sorted((cohort / "sites").iterdir())[:_NUM_SITES]]
        for folder in folders:
            shutil.copytree(cohort / "sites" / folder.name, folder)
        approve(folders, run)
        with deployed(folders, home / "logs") as deployment:
            for turn in range(repeats):
                for arm in ARMS:
                    for seconds in _measure(arm, run, home / f"{arm}-{turn}", deployment):
                        result.add(arm, {"cpu_seconds": seconds})
                    console.print(f"run {turn + 1}, {arm}: {result.mean('cpu_seconds', arm):.3f} CPU s per message")
    for other in ("plain", "echo"):
        ratio = result.mean("cpu_seconds", "worker") / result.mean("cpu_seconds", other)
        result.ratios[f"worker_over_{other}"] = ratio
        console.print(f"worker_over_{other}: {ratio:.3f}")
    return result


def _measure(arm: str, run: RunConfig, folder: Path, deployment: Deployment) -> list[float]:
    """CPU seconds per message, round by round. Raises RunError if the run failed."""
    _write_app(folder / "app", ARMS[arm])
    (folder / "run.toml").write_text(dump_toml(run.model_copy(update={"cohort": None})), encoding="utf-8")
    sites = [process.pid for name, process in deployment.processes.items() if name.endswith((".worker", ".supernode"))]
    (folder / "sessions.json").write_text(json.dumps(sites))
    submit(CONNECTION, {"run-dir": str(folder)}, deployment.environment, app=folder / "app")
    servers = [process for name, process in deployment.processes.items() if "." not in name]
    cpu = folder / "cpu.jsonl"
    wait_until(lambda: len(read_json_lines(cpu)) == run.train.rounds, f"arm {arm}", _RUN_TIMEOUT_S, *servers)
    readings = read_json_lines(cpu)
    if failed := [reason for reading in readings for reason in reading["failed"]]:
        raise RunError(f"arm {arm}: {len(failed)} messages failed: {failed[0]}")
    ticks = np.diff([reading["ticks"] for reading in readings])
    seconds = ticks / os.sysconf("SC_CLK_TCK") / [reading["messages"] for reading in readings[1:]]
    return [float(value) for value in seconds]


def _write_app(folder: Path, clientapp: str) -> None:
    """A Flower app of this bench's server and one of the clients, with our own code as the real one carries it."""
    leave_out = shutil.ignore_patterns("__pycache__")
    for package in ("client", "server", "strategies"):
        shutil.copytree(ROOT / package, folder / package, ignore=leave_out)
    shutil.copytree(Path(__file__).parent / "overhead_apps", folder / "overhead_apps", ignore=leave_out)
    (folder / "pyproject.toml").write_text(_APP.format(clientapp=clientapp), encoding="utf-8")
