"""Engine `flower`: `flwr run` on a local Flower connection.

A SuperLink of our own, with its own home and port, serves the run and is gone afterwards.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from server.console import Lines, follow
from server.flower_cli import FlowerRun, flower_environment, submit
from simulations.engines.job import Job
from simulations.engines.offline import OFFLINE
from simulations.engines.processes import end, free_ports, is_healthy, start, wait_until
from simulations.engines.resources import site_resources

_CONNECTION = "panfm-local"
_START_TIMEOUT_S = 300.0


def run(job: Job) -> None:
    """Run a federation through Flower's own run-time. Raises RunError unless Flower says that it completed."""
    with tempfile.TemporaryDirectory(prefix="panfm-flower-") as folder:
        home, (port, control_port) = Path(folder), free_ports(2)
        environment = private_environment(home) | {
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
            "FLWR_LOCAL_CONTROL_API_PORT": str(control_port),
        }
        connection = f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\naddress = ":local:"\n'
        (home / "config.toml").write_text(connection, encoding="utf-8")
        words = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1"]
        words += ["--port", str(port), "--control-api-address", f"127.0.0.1:{control_port}"]
        words += ["--database", f"sqlite:///{home / 'state.db'}?plugin=panfm"]
        superlink = start(words, home / "superlink.log", environment)
        try:
            wait_until(lambda: is_healthy(f"127.0.0.1:{port}"), "flower-superlink", _START_TIMEOUT_S, superlink)
            federation = f"num-supernodes={job.num_sites} client-resources-num-cpus=1"
            if share := site_resources(job)["num_gpus"]:
                federation += f" client-resources-num-gpus={share}"
            run_id = submit(_CONNECTION, job.run_config(), environment, "--federation-config", federation)
            wait_for_end(run_id, _CONNECTION, job, environment)
        finally:
            end(superlink)
            shutil.copyfile(home / "superlink.log", job.run_dir / "flower.log")


def private_environment(home: Path) -> dict[str, str]:
    """Environment of Flower's commands: offline, all files under `home`, this interpreter's commands first."""
    return flower_environment() | OFFLINE | {"FLWR_HOME": str(home)}


def wait_for_end(run_id: str, connection: str, job: Job, environment: Mapping[str, str]) -> None:
    """Show rounds as they end, until Flower says that the run has ended. Raises RunError if it failed."""
    follow(job.run_dir, Lines(), FlowerRun(run_id, connection), environment)
