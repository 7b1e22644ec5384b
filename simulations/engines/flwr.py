"""Flower's command line, as a user would type it, with an exit status that tells the truth.

Flower exits with 0 even when a run failed; what is here does not.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panfm.config import load_run
from panfm.errors import RunError
from server.progress import Progress
from simulations.engines.job import Job
from simulations.engines.offline import OFFLINE

ROOT = Path(__file__).resolve().parents[2]
_POLL_S = 1.0
_STATUS_S = 10.0
"""A look at the status costs a process; the rounds are read from the run folder meanwhile."""


def private_environment(home: Path) -> dict[str, str]:
    """Nothing is asked of the network, nothing is left outside `home`, our own interpreter's commands come first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return os.environ | OFFLINE | {"FLWR_HOME": str(home), "PATH": path}


def submit(connection: str, run_config: Mapping[str, str], environment: Mapping[str, str], *more: str) -> str:
    """Start a run of this checkout; returns Flower's run id."""
    words = " ".join(f"{key}={json.dumps(value)}" for key, value in run_config.items())
    return str(flwr(["run", str(ROOT), connection, "--run-config", words, *more], environment)["run-id"])


def wait_for_end(run_id: str, connection: str, job: Job, environment: Mapping[str, str]) -> None:
    """Show the rounds as they come, until Flower says that the run has ended. Raises RunError if it failed."""
    progress, run, model = Progress(), load_run(job.run_dir / "run.toml"), job.run_dir / "model" / "metadata.json"
    entry, asked, shown = {"status": ""}, time.monotonic(), 0
    while not entry["status"].startswith("finished"):
        time.sleep(_POLL_S)
        rounds = whole_rounds(job.run_dir / "rounds.jsonl")
        for line in rounds[shown:]:
            progress.round(run, line)
        shown = len(rounds)
        if model.exists() or time.monotonic() - asked > _STATUS_S:
            [entry] = flwr(["list", connection, "--run-id", run_id], environment)["runs"]
            asked = time.monotonic()
    if entry["status"] != "finished:completed" or not model.exists():
        reason = entry.get("status-details") or "no details"
        raise RunError(f"flower: run {entry['status']}: {reason}; the logs in the run folder tell more")


def whole_rounds(path: Path) -> list[dict[str, Any]]:
    """The rounds written so far; what follows the last line's end is still being written."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def flwr(words: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """What a `flwr` command answers in JSON. Raises RunError if it does not."""
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
