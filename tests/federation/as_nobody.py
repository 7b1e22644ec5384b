"""Tries every port, socket, file and process of a deployment from the account that runs this script.

Reads a JSON object from standard input: `ports` (listening TCP ports), `sockets` (names of listening Unix sockets),
`files` (paths) and `processes` (ids), all as root sees them. Prints what answered or could be read.
"""

import contextlib
import http.client
import json
import socket
import ssl
import stat
import sys
from pathlib import Path

ROUTES = ("control/list-runs", "control/start-run", "runtime/acquire-task", "fleet/pull-messages")
PATHS = (*(f"/v1/{route}" for route in ROUTES), "/docs", "/openapi.json", "/health")


def main() -> None:
    """Try everything that the JSON object names."""
    known = json.load(sys.stdin)
    found = {
        "ports": {port: answers for port in known["ports"] if (answers := ask_port(port))},
        "sockets": [name for name in known["sockets"] if connects(name)],
        "files": [path for path in known["files"] if is_readable(path)],
        "processes": [told for pid in known["processes"] for told in read_process(Path("/proc", str(pid)))],
    }
    json.dump(found, sys.stdout)


def ask_port(port: int) -> dict[str, int]:
    """Status that each path is answered with, over TLS or in plain text; empty if nothing answers."""
    answers = {}
    for path in PATHS:
        for is_encrypted in (True, False):
            with contextlib.suppress(OSError, http.client.HTTPException):
                answers[path] = post(port, path, is_encrypted)
                break
    return answers


def post(port: int, path: str, is_encrypted: bool) -> int:
    """The status of one request."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    kind = http.client.HTTPSConnection if is_encrypted else http.client.HTTPConnection
    connection = kind("127.0.0.1", port, timeout=20, **({"context": context} if is_encrypted else {}))
    with contextlib.closing(connection):
        method = "POST" if path.startswith("/v1") else "GET"
        connection.request(method, path, b"", {"Content-Type": "application/protobuf"})
        return connection.getresponse().status


def connects(name: str) -> bool:
    """Whether a Unix socket, by path or by abstract name (@...), takes a connection."""
    with socket.socket(socket.AF_UNIX) as door:
        door.settimeout(5)
        try:
            door.connect(f"\0{name[1:]}" if name.startswith("@") else name)
        except OSError:
            return False
        return True


def is_readable(path: str) -> bool:
    """Whether a file can be opened, or a folder listed."""
    try:
        if stat.S_ISDIR(Path(path).stat().st_mode):
            list(Path(path).iterdir())
        else:
            with Path(path).open("rb") as file:
                file.read(1)
    except OSError:
        return False
    return True


def read_process(folder: Path) -> list[str]:
    """Names of what can be read of a process."""
    return [f"{folder}/{name}" for name in ("cmdline", "environ", "fd", "maps") if is_readable(f"{folder}/{name}")]


if __name__ == "__main__":
    main()
