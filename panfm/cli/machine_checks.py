"""Checks of a machine on which Flower and a worker or a SuperLink run: isolation, permissions, units, network, disk.

Every check returns findings. `unknown` is what this account or machine cannot look at; it does not count as good. No
content of a file is told, only its path, owner and rights.
"""

import base64
import email.utils
import http.client
import os
import pwd
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import typer

from panfm.errors import one_line, reason

State = Literal["ok", "FAULT", "unknown"]
_CLOCK_S = 300.0
_CERTIFICATE_DAYS = 30
_DAY_S = 86_400
_DISK_SHARE, _DISK_BYTES = 0.05, 5 * 2**30
_TIMEOUT_S = 15.0
_FLEET, _CONTROL = "/v1/fleet/pull-messages", "/v1/control/list-runs"
_RULE = re.compile(
    r'^\s*(?:oifname "lo" )?tcp dport (\{[^}]*\}|\d+) meta skuid != (\{[^}]*\}|\S+) .*\b(?:reject|drop)\b', re.MULTILINE
)


@dataclass(frozen=True)
class Finding:
    """What one check has found."""

    state: State
    subject: str
    words: str
    """For a fault also what to do."""

    def line(self) -> str:
        """The finding in one line."""
        return f"{self.state:<7}  {one_line(f'{self.subject}: {self.words}', 500)}"


def tell(findings: Iterable[Finding]) -> None:
    """Print a line for each finding. Raises typer.Exit with status 1 unless all are ok."""
    is_well = True
    for finding in findings:
        typer.echo(finding.line())
        is_well &= finding.state == "ok"
    if not is_well:
        raise typer.Exit(1)


def check_rules(role: str, port: int, accounts: Sequence[str]) -> Finding:
    """Whether the rules of a role are loaded, and let these accounts, and no other, connect to a port of loopback."""
    subject, table = f"rules for port {port}", f"panfm_{role}"
    load = f"systemctl restart panfm-isolation@{role}"
    nft = shutil.which("nft", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if nft is None:
        return Finding("unknown", subject, "there is no nft here to look with; install nftables")
    done = subprocess.run([nft, "list", "table", "inet", table], capture_output=True, text=True, check=False)
    if done.returncode:
        if "No such file" in done.stderr:
            return Finding("FAULT", subject, f"table {table} is not loaded: every account may connect; {load}")
        return Finding("unknown", subject, f"nft tells nothing ({one_line(done.stderr, 100)}); run this as root")
    if not re.search(r"type filter hook output\b", done.stdout):
        return Finding("FAULT", subject, f"table {table} filters no outgoing connection; {load}")
    rules = [_words(rule[1]) for rule in _RULE.findall(done.stdout) if str(port) in _words(rule[0])]
    if not rules:
        return Finding("FAULT", subject, f"table {table} has no rule for it: every account may connect; {load}")
    let_in = set.intersection(*({_number(name) for name in rule} for rule in rules))
    expected = {_number(name) for name in accounts}
    if let_in != expected:
        names = ", ".join(sorted(map(_name, let_in))) or "nobody"
        return Finding("FAULT", subject, f"they let in {names}, expected {', '.join(accounts)}; mend and {load}")
    return Finding("ok", subject, f"loaded; only {', '.join(accounts)} may connect")


def _words(text: str) -> list[str]:
    return re.findall(r"[\w.-]+", text)


def _number(account: str) -> int:
    """Number of an account; -1 if it is not there."""
    try:
        return int(account) if account.isdigit() else pwd.getpwnam(account).pw_uid
    except KeyError:
        return -1


def _name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def check_port(port: int, accounts: Sequence[str]) -> Finding:
    """Whether something listens on a port of loopback alone, and refuses this account if it is none of these."""
    subject = f"port {port}"
    listening = [
        words[1].rpartition(":")[0]
        for name in ("tcp", "tcp6")
        if Path("/proc/net", name).exists()
        for words in map(str.split, Path("/proc/net", name).read_text(encoding="ascii").splitlines()[1:])
        if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port
    ]
    if not listening:
        return Finding("FAULT", subject, "nothing listens there; look whether its unit is active, and at its journal")
    if any(address not in ("0100007F", "00000000000000000000000001000000") for address in listening):
        return Finding("FAULT", subject, "listens on other addresses than loopback; give Flower --host 127.0.0.1")
    if os.geteuid() in map(_number, accounts):
        return Finding("ok", subject, "listens on loopback alone")
    with socket.socket() as door:
        door.settimeout(_TIMEOUT_S)
        if door.connect_ex(("127.0.0.1", port)) == 0:
            return Finding("FAULT", subject, f"answers account {_name(os.geteuid())}, which must be refused; see rules")
    return Finding("ok", subject, f"listens on loopback alone, and refuses account {_name(os.geteuid())}")


def check_processes_hidden(mounts: Path = Path("/proc/self/mounts")) -> Finding:
    """Whether accounts cannot see each other's processes: Flower writes tokens on its command lines."""
    lines = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    options = [words[3].split(",") for words in lines if words[1] == "/proc"]
    if options and {"hidepid=2", "hidepid=invisible", "hidepid=4", "hidepid=ptraceable"} & {*options[-1]}:
        return Finding("ok", "/proc", "hides the processes of other accounts")
    words = "shows every account the command lines of the others, tokens among them; mount -o remount,hidepid=2 /proc"
    return Finding("FAULT", "/proc", words)


def check_closed(path: Path, outsiders: Sequence[str], *, kind: str, is_needed: bool = True) -> Finding:
    """Whether accounts, by the rights of a path and of the folders that it lies in, can neither read nor enter it.

    Args:
        outsiders: Accounts by name or number; those that are not there are passed over.
        kind: For people, e.g. "key".
    """
    subject = f"{kind} {path}"
    try:
        path.stat()
        open_to = [name for name in dict.fromkeys(outsiders) if _number(name) > 0 and _may_read(path, name)]
    except FileNotFoundError:
        if is_needed:
            return Finding("FAULT", subject, "is not there; make it, or name where it is")
        return Finding("ok", subject, "is not there yet")
    except OSError as error:
        return Finding("unknown", subject, f"cannot be looked at ({reason(error)}); run this as root")
    if open_to:
        return Finding(
            "FAULT", subject, f"open to account {', '.join(open_to)}; chmod -R o-rwx {path}, and see its group"
        )
    return Finding("ok", subject, f"closed to {', '.join(dict.fromkeys(outsiders))}")


def _may_read(path: Path, account: str) -> bool:
    """Whether an account may read a file, or read or enter a folder, by rights of the file system alone."""
    user = _number(account)
    try:
        entry = pwd.getpwuid(user)
        groups = set(os.getgrouplist(entry.pw_name, entry.pw_gid))
    except KeyError:
        groups = {user}
    real = path.resolve()
    wanted = 5 if real.is_dir() else 4
    return all(_rights(folder, user, groups) & 1 for folder in real.parents) and bool(
        _rights(real, user, groups) & wanted
    )


def _rights(path: Path, user: int, groups: set[int]) -> int:
    """Rights of an account as three bits: read, write, enter."""
    status = path.stat()
    shift = 6 if status.st_uid == user else 3 if status.st_gid in groups else 0
    return status.st_mode >> shift & 7


def certificate_finding(subject: str, end: float) -> Finding:
    """Whether a certificate lasts another 30 days.

    Args:
        end: In seconds since the epoch.
    """
    days, day = (end - time.time()) / _DAY_S, time.strftime("%Y-%m-%d", time.localtime(end))
    if days > _CERTIFICATE_DAYS:
        return Finding("ok", subject, f"ends {day}, in {days:.0f} days")
    ends = f"ends {day}, in {days:.0f} days" if days > 0 else f"has ended, on {day}"
    return Finding("FAULT", subject, f"{ends}; the coordinator makes new ones (docs/kit.md)")


def check_units(names: Iterable[str]) -> list[Finding]:
    """Whether units are active, where systemd runs; elsewhere nothing is said of them."""
    if not Path("/run/systemd/system").is_dir():
        return []
    findings = []
    for name in names:
        try:
            done = subprocess.run(["systemctl", "is-active", name], capture_output=True, text=True, check=False)
        except OSError as error:
            findings.append(Finding("unknown", f"unit {name}", f"systemctl cannot be asked ({reason(error)})"))
            continue
        state = one_line(done.stdout) or "not known"
        words = "active" if state == "active" else f"is {state}; systemctl enable --now {name}, journalctl -u {name}"
        findings.append(Finding("ok" if state == "active" else "FAULT", f"unit {name}", words))
    return findings


def check_disk(folder: Path) -> Finding:
    """Whether the disk of a folder has room: a twentieth of it, or 5 GiB."""
    subject = f"disk of {folder}"
    try:
        usage = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists()))
    except OSError as error:
        return Finding("unknown", subject, f"cannot be looked at ({reason(error)}); run this as root")
    words = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB are free"
    if usage.free < min(_DISK_SHARE * usage.total, _DISK_BYTES):
        return Finding("FAULT", subject, f"{words}; make room")
    return Finding("ok", subject, words)


def check_connection(host: str, port: int, trusted: Path, *, connect_to: str = "") -> list[Finding]:
    """Whether the coordinator's door answers over TLS, forwards fleet routes and no other, and has the same time.

    Through the proxy that HTTPS_PROXY names, if any.

    Args:
        trusted: Certificate authorities.
        connect_to: Address of this machine, where the door is here; the certificate must be the host's all the same.
    """
    subject = f"connection to {host}:{port}"
    try:
        context = ssl.create_default_context(cafile=trusted)
        fleet, date, end = _post(host, port, _FLEET, context, connect_to)
        control, *_ = _post(host, port, _CONTROL, context, connect_to)
    except ssl.SSLError as error:
        words = one_line(getattr(error, "verify_message", "") or str(error), 120)
        return [Finding("FAULT", subject, f"TLS: {words}; see {trusted} and the server's certificate")]
    except PermissionError as error:
        return [Finding("unknown", subject, f"{trusted} cannot be read ({reason(error)}); run this as root")]
    except (OSError, ValueError, http.client.HTTPException) as error:
        words = f"{reason(error)}; see {trusted}, the name, outbound TCP to the port, and HTTPS_PROXY"
        return [Finding("FAULT", subject, words)]
    findings = [certificate_finding(f"certificate of {host}:{port}", end)]
    if fleet >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
        findings.append(Finding("FAULT", subject, f"the proxy there answers {fleet}: the SuperLink behind it is down"))
    elif fleet != http.HTTPStatus.UNAUTHORIZED:
        findings.append(Finding("FAULT", subject, f"answers {fleet} to {_FLEET}, expected 401: no SuperLink of ours"))
    elif control != http.HTTPStatus.NOT_FOUND:
        words = f"answers {control} to {_CONTROL}, expected 404: nginx.conf must publish the fleet routes alone"
        findings.append(Finding("FAULT", subject, words))
    else:
        findings.append(Finding("ok", subject, "the SuperLink answers, and control routes are closed"))
    return [*findings, _clock(host, date)]


def _clock(host: str, date: str | None) -> Finding:
    subject = "clock"
    if not date:
        return Finding("unknown", subject, f"{host} does not tell its time")
    apart = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    words = f"{abs(apart):.0f} s {'ahead of' if apart > 0 else 'behind'} that of {host}"
    if abs(apart) > _CLOCK_S:
        return Finding("FAULT", subject, f"{words}; SuperNodes are refused beyond {_CLOCK_S:.0f} s; set it (NTP)")
    return Finding("ok", subject, words)


def _post(host: str, port: int, path: str, context: ssl.SSLContext, connect_to: str) -> tuple[int, str | None, float]:
    """Post nothing to a path; returns status, the server's time, and the end of its certificate."""
    connection = _connection(host, port, context, connect_to)
    try:
        if connect_to:
            door = socket.create_connection((connect_to, port), timeout=_TIMEOUT_S)
            connection.sock = context.wrap_socket(door, server_hostname=host)
        connection.request("POST", path, b"", {"Content-Type": "application/protobuf"})
        peer = connection.sock.getpeercert() or {}
        reply = connection.getresponse()
        return reply.status, reply.headers["Date"], ssl.cert_time_to_seconds(str(peer["notAfter"]))
    finally:
        connection.close()


def _connection(host: str, port: int, context: ssl.SSLContext, connect_to: str) -> http.client.HTTPSConnection:
    proxy = "" if connect_to else os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or ""
    if not proxy:
        return http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=context)
    through = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    headers = {}
    if through.username:
        words = f"{unquote(through.username)}:{unquote(through.password or '')}"
        headers = {"Proxy-Authorization": f"Basic {base64.b64encode(words.encode()).decode()}"}
    connection = http.client.HTTPSConnection(
        through.hostname or "", through.port or 80, timeout=_TIMEOUT_S, context=context
    )
    connection.set_tunnel(host, port, headers)
    return connection
