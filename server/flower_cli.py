"""Calls of Flower's command line that raise RunError when they fail.

Flower exits with 0 even when a run failed or a command did not get through.
"""

import json
import os
import socket
import ssl
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from panfm.errors import RunError, one_line

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Settings under which Flower talks to nobody and installs nothing."""
_UNAVAILABLE = "Connection to the SuperLink is unavailable"
_DOOR_S = 5.0


@dataclass(frozen=True)
class FlowerRun:
    """A run as a SuperLink knows it."""

    run_id: str
    connection: str
    """Name of the SuperLink connection in $FLWR_HOME/config.toml."""

    def entry(self, environment: Mapping[str, str]) -> tuple[str, str]:
        """Status (`pending`, `running`, `finished:completed`, `finished:failed`, ...) and details. Raises RunError."""
        [entry] = flwr(["list", self.connection, "--run-id", self.run_id], environment)["runs"]
        return entry["status"], one_line(entry.get("status-details") or "no details")

    def stop(self, environment: Mapping[str, str]) -> None:
        """End it; its ServerApp is ended within a minute. Raises RunError."""
        flwr(["stop", self.run_id, self.connection], environment)


def flower_environment() -> dict[str, str]:
    """Environment of this process, with Flower offline and the commands of this interpreter first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return os.environ | OFFLINE | {"PATH": path}


def submit(
    connection: str, run_config: Mapping[str, str], environment: Mapping[str, str], *more: str, app: Path = ROOT
) -> str:
    """Start a run of an app, this checkout's when left out; returns Flower's run id."""
    words = " ".join(f"{key}={json.dumps(value)}" for key, value in run_config.items())
    return str(flwr(["run", str(app), connection, "--run-config", words, *more], environment)["run-id"])


def as_one_word(texts: Sequence[str]) -> str:
    """Several texts as one value of a run config, in which Flower takes no quotes."""
    return ",".join(quote(text, safe="") for text in texts)


def of_one_word(word: str) -> list[str]:
    """The texts that `as_one_word` was given."""
    return [unquote(text) for text in word.split(",")]


def flwr(words: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a `flwr` command and return its JSON answer. Raises RunError, in one line, if it fails."""
    done = subprocess.run(
        ["flwr", *words, "--format", "json"], env=environment, capture_output=True, text=True, check=False
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError as error:
        raise RunError(f"flwr {words[0]}: {one_line((done.stderr or done.stdout).strip()[-300:])}") from error
    if not answer.get("success", True):
        text = answer.get("error-message", "failed").strip().rpartition("\n\n")[2]  # first it tells what it is doing
        if text.startswith(_UNAVAILABLE):
            raise RunError(_why_unavailable(words, environment))
        raise RunError(f"flwr {words[0]}: {one_line(text)}")
    return answer


def _why_unavailable(words: list[str], environment: Mapping[str, str]) -> str:
    """Tell why the SuperLink that a command names cannot be reached; Flower only calls it unavailable."""
    home = Path(environment.get("FLWR_HOME") or Path.home() / ".flwr")
    connections = tomllib.loads((home / "config.toml").read_text(encoding="utf-8"))["superlink"]
    name = next(word for word in words[1:] if word in connections)
    known = connections[name]
    host, _, port = known["address"].rpartition(":")
    where = f"connection {name} of {home / 'config.toml'}: {known['address']}"
    try:
        with socket.create_connection((host, int(port)), timeout=_DOOR_S) as door:
            if known.get("insecure"):
                return f"{where} answers, but not in plain text: insecure = true where TLS is expected?"
            context = ssl.create_default_context(cafile=known.get("root-certificates"))
            context.wrap_socket(door, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        return f"{where} has a certificate that is not trusted ({error.verify_message})"
    except (OSError, ValueError) as error:
        return f"{where} does not answer ({one_line(str(error))})"
    return f"{where} answers, but does not speak to us"
