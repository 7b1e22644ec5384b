"""A machine with the accounts, folders and units that are shipped, in namespaces of its own: coordinator and one site.

The units' commands, accounts, environment, folders, rules of nftables and hidepid are those of
configs/deployment/hosts, word for word. In place of systemd, which does not run in tests, this file applies them, and
of the sandbox UMask, ProtectProc, ProcSubset, ProtectSystem (the root file system), PrivateTmp (/var/tmp),
InaccessiblePaths, PrivateNetwork, NoNewPrivileges and CapabilityBoundingSet.

Everything here must run as root inside `NAMESPACES`.
"""

import grp
import os
import pwd
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from simulations.engines.processes import Process

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ROOT / "configs" / "deployment" / "hosts"
CREDENTIALS = ROOT / "configs" / "deployment" / "credentials.sh"
NAMESPACES = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
ACCOUNTS = {"panfm-coordinator": 61001, "flower": 61002, "panfm": 61003}
COORDINATOR, SITE = Path("/srv/panfm/runs"), Path("/srv/panfm/site")
SITE_KEYS = Path("/etc/panfm-site")
"""The site's /etc/panfm: coordinator and site are one machine here."""
LOGS = Path("/srv/logs")
FLWR_HOME = Path("/var/lib/panfm-coordinator/flwr")


@dataclass
class Unit:
    """A shipped unit: values by key of its [Service] section."""

    name: str
    """Without `.service`; of a template with the instance's name."""
    values: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        template, at, instance = self.name.partition("@")
        text = (HOSTS / f"{template}{at}.service").read_text(encoding="utf-8").replace("\\\n", " ")
        service = text.partition("[Service]\n")[2].partition("\n[")[0]
        for line in service.splitlines():
            if "=" in line and not line.startswith("#"):
                key, _, value = line.partition("=")
                self.values[key].append(value.replace("%i", instance))

    def value(self, key: str) -> str:
        """The last value of a key; empty if it is not there."""
        return self.values[key][-1] if key in self.values else ""


def lay_out() -> None:
    """Give this mount namespace empty folders in place of the machine's, the accounts, and the environments in /opt."""
    run("mount", "--make-rprivate", "/")
    os.umask(0o022)
    kept = [path for path in {sys.base_prefix, sys.prefix, str(ROOT)} if Path(path).is_relative_to("/root")]
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/mnt")
    for number, path in enumerate(kept):
        Path(f"/mnt/{number}").mkdir()
        run("mount", "--bind", path, f"/mnt/{number}")
    shutil.copytree("/etc", "/mnt/etc", symlinks=True)
    for folder in ("/root", "/srv", "/opt", "/run", "/var/lib"):
        run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", folder)
    run("mount", "--bind", "/mnt/etc", "/etc")
    for number, path in enumerate(kept):
        Path(path).mkdir(parents=True)
        run("mount", "--bind", f"/mnt/{number}", path)
    for name, number in ACCOUNTS.items():
        append("/etc/passwd", f"{name}:x:{number}:{number}::/nonexistent:/usr/sbin/nologin")
        append("/etc/group", f"{name}:x:{number}:{'panfm' if name == 'flower' else ''}")
    append("/etc/hosts", "127.0.0.1 localhost coordinator.example.org")
    for environment in ("panfm", "flower"):
        Path("/opt", environment).symlink_to(sys.prefix)
    for folder in ("/etc/nftables.d", "/var/lib/nginx", "/etc/systemd/system"):
        Path(folder).mkdir(exist_ok=True)
    LOGS.mkdir(mode=0o700)
    for rules in HOSTS.glob("*.nft"):
        shutil.copy(rules, "/etc/nftables.d")
    for unit in HOSTS.glob("*.service"):
        shutil.copy(unit, "/etc/systemd/system")
    run("ip", "link", "set", "lo", "up")


def make_credentials() -> None:
    """Make certificates and keys, and give each to the account that uses it, as docs/coordinator.md says."""
    run(str(CREDENTIALS), "coordinator", "/etc/panfm", "coordinator.example.org")
    run(str(CREDENTIALS), "site", str(SITE_KEYS), "example-hospital")
    shutil.copy("/etc/panfm/ca.crt", SITE_KEYS)
    give("/etc/panfm", "panfm-coordinator")
    give(SITE_KEYS, "flower")
    for path in (COORDINATOR, SITE.parent):
        path.mkdir(parents=True, exist_ok=True)
    COORDINATOR.chmod(0o700)
    give(COORDINATOR, "panfm-coordinator")


def load(name: str) -> None:
    """Start a unit that runs once, as root: the isolation."""
    for command in Unit(name).values["ExecStart"]:
        run(*shlex.split(command))


def start_unit(name: str) -> Process:
    """Start a unit under its account and, as far as it can be done without systemd, in its sandbox."""
    unit = Unit(name)
    account = unit.value("User")
    for key, parent in (("StateDirectory", "/var/lib"), ("RuntimeDirectory", "/run")):
        if unit.value(key):
            folder = Path(parent, unit.value(key))
            folder.mkdir(exist_ok=True)
            folder.chmod(int(unit.value(f"{key}Mode") or "755", 8))
            give(folder, account)
    entries = pwd.getpwnam(account)
    groups = [str(group.gr_gid) for group in grp.getgrall() if account in group.gr_mem]
    command = ["setpriv", "--reuid", account, "--regid", str(entries.pw_gid), "--no-new-privs", "--bounding-set=-all"]
    command += ["--groups", ",".join([str(entries.pw_gid), *groups]), *shlex.split(unit.value("ExecStart"))]
    network = ["--net"] if unit.value("PrivateNetwork") == "yes" else []
    steps = f'{sandbox(unit)}\numask {unit.value("UMask")}\ncd {unit.value("WorkingDirectory") or "/"}\nexec "$@"'
    settings = [each.split("=", 1) for line in unit.values["Environment"] for each in line.split()]
    environment = {"PATH": "/usr/sbin:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": "/nonexistent"} | dict(settings)
    with (LOGS / f"{name}.log").open("ab") as log:
        words = ["unshare", "--mount", *network, "bash", "-ec", steps, name, *command]
        return subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)


def sandbox(unit: Unit) -> str:
    """Shell commands that apply a unit's sandbox in a mount namespace of its own."""
    hidden = {"invisible": "hidepid=2"}[unit.value("ProtectProc")]
    subset = ",subset=pid" if unit.value("ProcSubset") == "pid" else ""
    steps = [f"mount -t proc -o {hidden}{subset} proc /proc"]
    if unit.name == "panfm-supernode":
        steps.append(f"mount --bind {SITE_KEYS} /etc/panfm")
    if paths := unit.value("InaccessiblePaths"):
        steps.append(f"mount -t tmpfs -o mode=000 tmpfs {paths.removeprefix('-')}")
    return "\n".join([*steps, "mount -t tmpfs -o mode=1777 tmpfs /var/tmp", "mount -o remount,bind,ro /"])


def start_nginx() -> Process:
    """The shipped server under nginx's usual account."""
    text = f"daemon off; user www-data; pid /run/nginx.pid; error_log {LOGS}/nginx.log;\nevents {{}}\n"
    text += f"http {{ access_log off; include {HOSTS / 'nginx.conf'}; }}\n"
    Path("/etc/panfm-nginx.conf").write_text(text, encoding="utf-8")
    return subprocess.Popen(["/usr/sbin/nginx", "-e", f"{LOGS}/nginx.log", "-c", "/etc/panfm-nginx.conf"])


def run(*words: str, **settings: object) -> str:
    """Run a command as root; returns what it prints. Raises CalledProcessError with what it complained about."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, **settings)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def run_as(account: str, *words: str, more: Mapping[str, str] | None = None, text: str = "") -> str:
    """Run a command under an account that has its own group only."""
    entry = pwd.getpwnam(account)
    settings = {"PATH": "/opt/panfm/bin:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "FLWR_HOME": str(FLWR_HOME)}
    command = ["setpriv", "--reuid", account, "--regid", str(entry.pw_gid), "--clear-groups", *words]
    return run(*command, env=settings | dict(more or {}), cwd=str(ROOT), input=text)


def give(path: Path | str, account: str) -> None:
    """Make a folder and all in it an account's."""
    run("chown", "-R", f"{account}:{account}", str(path))


def append(path: str, line: str) -> None:
    """Write a line at the end of a file."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def listening_ports() -> Sequence[int]:
    """TCP ports on which anything listens, of both versions of IP."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return sorted({int(words[1].rpartition(":")[2], 16) for words in lines if words[3] == "0A"})


def listening_sockets() -> Sequence[str]:
    """Names of Unix sockets on which anything listens, in the networks of all processes."""
    lines = [line.split() for path in Path("/proc").glob("[0-9]*/net/unix") for line in path.read_text().splitlines()]
    return sorted({words[7] for words in lines if len(words) > 7 and words[0] != "Num" and int(words[3], 16) & 0x10000})


def processes_of(accounts: Sequence[str]) -> list[int]:
    """Processes of some accounts."""
    numbers = {pwd.getpwnam(name).pw_uid for name in accounts}
    return sorted(int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and owner(path) in numbers)


def owner(path: Path) -> int:
    """Account that a path belongs to; -1 if it is gone."""
    try:
        return path.stat().st_uid
    except FileNotFoundError:
        return -1
