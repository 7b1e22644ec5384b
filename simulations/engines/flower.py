"""Engine `flower`: `flwr run` on a local Flower connection, as a user of Flower would type it.

A SuperLink of our own, with its own home and port, serves the run and is gone afterwards. Flower exits with 0 even
when a run failed; this does not.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from panfm.config import load_run
from panfm.errors import RunError
from server.progress import Progress
from simulations.engines.job import Job
from simulations.engines.offline import OFFLINE

_ROOT = Path(__file__).resolve().parents[2]
_CONNECTION = "panfm-local"
_START_TIMEOUT_S = 60.0
_POLL_S = 3.0


def run(job: Job) -> None:
    """Run a federation through Flower's own run-time. Raises RunError unless Flower says that it completed."""
    with tempfile.TemporaryDirectory(prefix="panfm-flower-") as home:
        port, control_port = _free_ports(2)
        environment = os.environ | OFFLINE | {
            "FLWR_HOME": home,
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
            "FLWR_LOCAL_CONTROL_API_PORT": str(control_port),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }  # fmt: skip
        connection = f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\naddress = ":local:"\n'
        Path(home, "config.toml").write_text(connection, encoding="utf-8")
        try:
            with _superlink(Path(home), port, control_port, environment):
                _wait_for_end(_submit(job, environment), job, environment)
        finally:
            shutil.copyfile(Path(home, "superlink.log"), job.run_dir / "flower.log")


@contextmanager
def _superlink(home: Path, port: int, control_port: int, environment: dict[str, str]) -> Iterator[None]:
    """The daemon that `flwr run` would start by itself, in a process group that can be ended."""
    words = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1"]
    words += ["--port", str(port), "--control-api-address", f"127.0.0.1:{control_port}"]
    words += ["--database", str(home / "state.db")]
    with (home / "superlink.log").open("wb") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            _wait_until_healthy(process, port)
            yield
        finally:
            for stop in (signal.SIGTERM, signal.SIGKILL):
                _end_group(process, stop)


def _end_group(process: "subprocess.Popen[bytes]", stop: signal.Signals) -> None:
    try:
        os.killpg(process.pid, stop)
        process.wait(timeout=10)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        return


def _wait_until_healthy(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RunError(f"flower-superlink did not start within {_START_TIMEOUT_S:g} s; see flower.log in the run folder")


def _submit(job: Job, environment: dict[str, str]) -> str:
    """Start the run; returns Flower's run id."""
    run_config = " ".join(f"{key}={json.dumps(value)}" for key, value in job.run_config().items())
    federation = f"num-supernodes={job.num_sites} client-resources-num-cpus=1"
    answer = _flwr(
        ["run", str(_ROOT), _CONNECTION, "--run-config", run_config, "--federation-config", federation], environment
    )
    return str(answer["run-id"])


def _wait_for_end(run_id: str, job: Job, environment: dict[str, str]) -> None:
    """Show the rounds as they come, until Flower says that the run has ended."""
    progress, run = Progress(), load_run(job.run_dir / "run.toml")
    status, shown = "", 0
    while not status.startswith("finished"):
        time.sleep(_POLL_S)
        [entry] = _flwr(["list", _CONNECTION, "--run-id", run_id], environment)["runs"]
        status = entry["status"]
        rounds = whole_rounds(job.run_dir / "rounds.jsonl")
        for line in rounds[shown:]:
            progress.round(run, line)
        shown = len(rounds)
    if status != "finished:completed" or not (job.run_dir / "model" / "metadata.json").exists():
        raise RunError(f"flower: run {status}: {entry.get('status-details') or 'no details'}; see flower.log")


def whole_rounds(path: Path) -> list[dict[str, Any]]:
    """The rounds written so far; what follows the last line's end is still being written."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _flwr(words: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """What a `flwr` command answers in JSON."""
    done = subprocess.run(
        ["flwr", *words, "--format", "json"], env=environment, capture_output=True, text=True, check=False
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError as error:
        raise RunError(f"flwr {words[0]}: {(done.stderr or done.stdout).strip()[-300:]}") from error
    if not answer.get("success", True):
        raise RunError(f"flwr {words[0]}: {answer.get('error-message', 'failed')}")
    return answer


def _free_ports(number: int) -> list[int]:
    """Ports that nobody uses now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
