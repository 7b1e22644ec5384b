"""Runs a federation on a machine as shipped and writes down what `nobody`, and then others, found out about it.

python -m tests.federation.isolation_trial SITE_FOLDER RUN_TOML FINDINGS_JSON      as root, inside NAMESPACES
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from simulations.engines.processes import wait_until
from tests.federation.shipped_machine import (
    ACCOUNTS,
    COORDINATOR,
    FLWR_HOME,
    LOGS,
    ROOT,
    SITE,
    SITE_KEYS,
    give,
    lay_out,
    listening_ports,
    listening_sockets,
    load,
    make_credentials,
    processes_of,
    run,
    run_as,
    start_nginx,
    start_unit,
)

LONG_S = 120.0
SOCKET = Path("/run/panfm/worker.sock")
STATE = Path("/var/lib/panfm-coordinator")
FOLDERS = (Path("/etc/panfm"), SITE_KEYS, STATE, Path("/var/lib/flower"), Path("/srv/panfm"), SOCKET.parent)


def main(site: Path, experiment: Path, findings: Path) -> None:
    """Set up, run until a round is under way, try, take the protections away, try again."""
    lay_out()
    make_credentials()
    shutil.copytree(site, SITE)
    shutil.copy(experiment, "/srv/run.toml")
    Path("/srv/run.toml").chmod(0o644)
    SITE.chmod(0o700)
    give(SITE, "panfm")
    load("panfm-isolation@coordinator")
    load("panfm-isolation@site")
    worker = start()
    begin()
    os.killpg(worker.pid, signal.SIGSTOP)  # so that a ClientApp waits for its answer while everything is tried
    wait_until(lambda: bool(command_lines("flwr-clientapp")), "a ClientApp", LONG_S)
    wait_until(is_asked, "the worker is asked", LONG_S)
    found = {"known": known(), "nobody": attempt("nobody")}
    found["coordinator"] = attempt("panfm-coordinator")
    found["flower"] = attempt("flower")
    found["panfm"] = attempt("panfm")
    found["tokens"] = command_lines("--token")
    found["doctors"] = doctors()
    take_protections_away()
    found["without"] = attempt("nobody")
    found["doctors without"] = doctors()
    findings.write_text(json.dumps(found), encoding="utf-8")


def start() -> subprocess.Popen[bytes]:
    """Start all units and register the site; returns the worker."""
    FLWR_HOME.mkdir(parents=True)
    connection = 'address = "127.0.0.1:8000"\nroot-certificates = "/etc/panfm/ca.crt"\n'
    text = f'[superlink]\ndefault = "deployment"\n\n[superlink.deployment]\n{connection}'
    (FLWR_HOME / "config.toml").write_text(text, encoding="utf-8")
    shutil.copy(SITE_KEYS / "example-hospital.pub", FLWR_HOME)
    start_unit("panfm-superlink")
    worker = start_unit("panfm-worker")
    wait_until(lambda: 8000 in listening_ports(), "panfm-superlink", LONG_S)
    start_unit("panfm-superexec")
    start_nginx()
    key = str(FLWR_HOME / "example-hospital.pub")
    run_as("panfm-coordinator", "flwr", "supernode", "register", key, "deployment", "--name", "example-hospital")
    wait_until(SOCKET.exists, "panfm-worker", LONG_S, worker)
    start_unit("panfm-supernode")
    return worker


def begin() -> None:
    """Approve the experiment at the site, start it, and wait for a model."""
    python = "/opt/panfm/bin/python"
    words = run_as("panfm-coordinator", python, "-m", "server", "hash", "/srv/run.toml").split()
    [experiment] = [word for word in words if len(word) == 64]
    run_as("panfm", "panfm", "site", "approve", str(SITE), experiment)
    folder = COORDINATOR / "small"
    more = ("--connection", "deployment", "--out", str(folder), "--detach")
    run_as("panfm-coordinator", python, "-m", "server", "start", "/srv/run.toml", *more)
    wait_until(lambda: bool(list(folder.glob("checkpoint/*.state"))), "round 1", LONG_S)


def known() -> dict[str, list[object]]:
    """Every port, socket, file and process of the deployment, as root sees them."""
    accounts = [*ACCOUNTS, "www-data"]
    files = {str(path) for folder in FOLDERS for path in (folder, *folder.rglob("*")) if not path.is_symlink()}
    processes = processes_of(accounts)
    for pid in processes:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = str(descriptor.readlink()) if descriptor.is_symlink() else ""
            if target.startswith("/") and not target.startswith(("/dev/", "/proc/", sys.prefix, str(ROOT), str(LOGS))):
                files.add(target)
    names = {"ports": listening_ports(), "sockets": listening_sockets()}
    return names | {"files": sorted(files), "processes": processes}


def attempt(account: str) -> dict[str, object]:
    """Try, from an account, everything that root knows of; return what answered or could be read."""
    script = str(Path(__file__).with_name("as_nobody.py"))
    told: dict[str, object] = json.loads(
        run_as(account, "/opt/panfm/bin/python", "-I", "-S", script, text=json.dumps(known()))
    )
    return told


def doctors() -> dict[str, list[object]]:
    """Exit status and lines of `server doctor` and `panfm site doctor`, as root."""
    commands = {"coordinator": ["-m", "server", "doctor"], "site": ["-m", "panfm", "site", "doctor", str(SITE)]}
    found: dict[str, list[object]] = {}
    for role, words in commands.items():
        command = ["/opt/panfm/bin/python", *words]
        settings = {"PATH": "/opt/panfm/bin:/usr/sbin:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
        found[role] = [done.returncode, f"{done.stdout}{done.stderr}".splitlines()]
    return found


def take_protections_away() -> None:
    """The control: no rules, open processes, folders that are open to all."""
    for role in ("coordinator", "site"):
        run("nft", "delete", "table", "inet", f"panfm_{role}")
    run("mount", "-o", "remount,hidepid=0", "/proc")
    for folder in FOLDERS:
        run("chmod", "-R", "a+rwX", str(folder))


def command_lines(word: str) -> list[str]:
    """Command lines that hold a word."""
    lines = []
    for pid in processes_of([*ACCOUNTS]):
        try:
            text = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        lines += [text] if word in text else []
    return lines


def is_asked() -> bool:
    """Whether a connection to the worker is open: its far end belongs to the network of who has asked."""
    return str(SOCKET) in Path("/proc/net/unix").read_text(encoding="ascii")


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:]))
    except Exception:
        for log in sorted(LOGS.glob("*")):
            print(f"--- {log}\n{log.read_text(encoding='utf-8', errors='replace')[-2500:]}")
        raise
