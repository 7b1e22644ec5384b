#!/usr/bin/python3
"""Does what `systemctl enable`, `restart`, `is-active`, `list-units` and `daemon-reload` do on a test's machine.

It starts a unit under its account, with its environment and folders, and starts it again when it ends. The sandbox of a
unit is not made: `systemd-analyze` and the tests of isolation look at that.
"""

import os
import pwd
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

STATE = Path("/run/units")


def settings(unit: str) -> dict[str, list[str]]:
    path = Path("/etc/systemd/system") / unit
    if not path.exists():
        path = path.with_name(re.sub("@.*[.]", "@.", unit))
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for more in sorted(path.with_name(f"{unit}.d").glob("*.conf")):
        text += more.read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


def start(unit: str) -> None:
    if is_running(unit):
        return
    if unit == "nginx.service":
        command, account, seconds, environment = "nginx -g 'daemon off;'", "root", "1", []
    elif unit.startswith("panfm-isolation@"):
        return
    else:
        known = settings(unit)
        [command], account, seconds = known["ExecStart"], known["User"][0], known["RestartSec"][0]
        environment = [word for line in known.get("Environment", []) for word in shlex.split(line)]
        user = pwd.getpwnam(account)
        for kind, base in (("RuntimeDirectory", "/run"), ("StateDirectory", "/var/lib")):
            for name in known.get(kind, []):
                folder = Path(base) / name
                folder.mkdir(exist_ok=True)
                os.chown(folder, user.pw_uid, user.pw_gid)
                folder.chmod(int(known.get(f"{kind}Mode", ["0755"])[0], 8))
    words = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/nonexistent", *environment]
    words += ["OMP_NUM_THREADS=1", "PYTHONDONTWRITEBYTECODE=1", *shlex.split(command)]
    if account != "root":
        words = ["runuser", "-u", account, "--", *words]
    loop = ["bash", "-c", f'cd /; while :; do "$@"; sleep {seconds}; done', unit, *words]
    with (STATE / f"{unit}.log").open("ab") as log:
        process = subprocess.Popen(loop, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    (STATE / unit).write_text(str(process.pid), encoding="ascii")


def is_running(unit: str) -> bool:
    path = STATE / unit
    return path.exists() and Path(f"/proc/{path.read_text(encoding='ascii')}").exists()


def stop(unit: str) -> None:
    if is_running(unit):
        session = int((STATE / unit).read_text(encoding="ascii"))
        os.kill(session, signal.SIGKILL)  # else it would start again what ends
        subprocess.run(["pkill", "-TERM", "--session", str(session)], check=False)
        subprocess.run(["timeout", "20", "sh", "-c", f"while pgrep -s {session}; do sleep .2; done"], check=False)
    (STATE / unit).unlink(missing_ok=True)


verb, *words = sys.argv[1:]
units = [word for word in words if not word.startswith("-")]
if verb not in {"daemon-reload", "enable", "restart", "is-active", "list-units"}:
    sys.exit(f"systemctl: {verb}: not known to this stand-in")
if verb == "is-active":
    print("active" if units[0].startswith("panfm-isolation@") or is_running(units[0]) else "inactive")
if verb in {"is-active", "list-units"}:  # of runs no unit is started here
    sys.exit(0)
for each in units:
    if verb == "restart":
        stop(each)
    start(each)
