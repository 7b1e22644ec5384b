#!/usr/bin/env python3
"""Installs a hospital's worker and SuperNode from the kit that this file lies in. Python 3.11's own library only.

    python3 -I install.py --check        look at this machine, change nothing; one line per fault
    python3 -I install.py                look, then install; given again, it mends what is missing and replaces no key
    python3 -I install.py --renew-key    make a new key for the SuperNode; the old one stays beside it

Run it as root, in a folder into which no other account may write. -I: no module is taken from that folder.
What it makes, in this order:

    /opt/panfm-kit/HASH       the kit, copied and checked against its SHA256SUMS; all below is installed from there
    accounts                  panfm (reads images), flower (runs the SuperNode), panfm-install (runs pip, owns nothing)
    /opt/panfm, /opt/flower   links to two environments that pip filled as panfm-install, with hashes, wheels only
    /srv/panfm                images/ (yours to fill) and site/ (site.toml, manifest.csv, private state), of panfm alone
    /etc/panfm                ca.crt and the SuperNode's key, which is made here and never leaves
    /etc/systemd/system       units of the worker and the SuperNode, started

It connects to the coordinator's address only, over the proxy that HTTPS_PROXY names; a later run without the variable
takes the one in /etc/panfm/proxy.env (remove that file to use none). pip uses this machine's package index, or wheels/
of a kit that has it.
"""

import base64
import contextlib
import email.utils
import grp
import hashlib
import http.client
import json
import os
import platform
import pwd
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

KIT = Path(__file__).resolve().parent
COPIES = Path("/opt/panfm-kit")
CONFIG = Path("/etc/panfm")
DATA = Path("/srv/panfm")
UNITS = Path("/etc/systemd/system")
RULES = Path("/etc/nftables.d")
ENVIRONMENTS = {"panfm": "requirements.txt", "flower": "requirements-flower.txt"}
ACCOUNTS = ("panfm", "flower", "panfm-install")
PROGRAMS = ("ssh-keygen", "useradd", "usermod", "runuser", "systemctl", "nft")
SERVICES = ("panfm-isolation@site.service", "panfm-worker.service", "panfm-supernode.service")
CLOCK_S = 300
TIMEOUT_S = 15
SETTLE_S = 10


def main(words: list[str]) -> int:
    """Do what the command line asks; returns the exit status."""
    if words not in ([], ["--check"], ["--renew-key"]):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        settings = json.loads((KIT / "kit.json").read_text(encoding="utf-8"))
        found = faults(settings, with_network=words != ["--renew-key"])
    except (OSError, ValueError, KeyError) as error:
        print(f"FAULT  {KIT}: no whole kit ({error}); unpack it again")
        return 1
    for fault in found:
        print(f"FAULT  {fault}")
    if found:
        print(f"{len(found)} faults, nothing was changed")
        return 1
    print(f"this machine is ready for {settings['hospital']}: no fault")
    if words == ["--check"]:
        return 0
    try:
        if words == ["--renew-key"]:
            renew_key(settings["hospital"])
        else:
            install(settings)
        tell(settings)
    except (OSError, LookupError, ValueError, subprocess.CalledProcessError, RuntimeError) as error:
        print(f"FAULT  {error}; mend it and run this again")
        return 1
    return 0


# --- What is looked at before anything is changed ---


def faults(settings: dict, *, with_network: bool) -> list[str]:
    """All faults of this machine and of the kit, one line each."""
    found = altered(KIT) + machine_faults(settings) + place_faults(settings["hospital"])
    if with_network and not found_altered_ca(found):
        found += network_faults(settings["server"], settings["port"])
    return found


def found_altered_ca(found: list[str]) -> bool:
    """Whether ca.crt is not the kit's own: then nothing is asked of the network with it."""
    return any(line.startswith(str(KIT / "ca.crt")) for line in found)


def altered(folder: Path) -> list[str]:
    """Files of a kit that are not what its SHA256SUMS says, are missing, or are not in it."""
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    folders = {str(parent) for name in expected for parent in Path(name).parents}
    everything = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    present = {name for name, path in everything.items() if path.is_symlink() or path.is_file()}
    strange = {*everything} - {"SHA256SUMS", *expected} - {name for name in folders if name not in present}
    found = [f"{folder / name}: is not of this kit; unpack it in an empty folder" for name in sorted(strange)]
    for name, digest in expected.items():
        path = folder / name
        if name not in present or path.is_symlink():
            found.append(f"{path}: missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            found.append(f"{path}: its SHA-256 is not the one in SHA256SUMS")
    return found


def machine_faults(settings: dict) -> list[str]:
    """Account, Python, programs, disk and GPU."""
    found = []
    if os.geteuid() != 0:
        found.append("account: found no root, expected root (sudo)")
    python = ".".join(platform.python_version_tuple()[:2])
    if (python, platform.machine()) != (settings["python"], settings["machine"]):
        expected = f"Python {settings['python']} on {settings['machine']}"
        found.append(f"python3: found Python {python} on {platform.machine()}, expected {expected}")
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        found.append(
            f"programs: found no {', '.join(missing)}; install openssh-client, passwd, util-linux, systemd, nftables"
        )
    if subprocess.run(
        [sys.executable, "-I", "-c", "import ensurepip, venv"], capture_output=True, check=False
    ).returncode:
        found.append("python3: has no module venv; install python3-venv")
    for account in ACCOUNTS:
        with contextlib.suppress(KeyError):
            if (known := pwd.getpwnam(account)).pw_uid >= 1000 or not known.pw_shell.endswith(("nologin", "false")):
                found.append(
                    f"account {account}: is somebody's login, expected none or a system account without a shell"
                )
    is_installed = Path("/opt/panfm").is_symlink()
    for place in () if is_installed else (Path("/opt"), Path("/srv")):
        free = shutil.disk_usage(place if place.exists() else "/").free / 2**30
        if free < settings["disk-gib"]:
            found.append(f"{place}: {free:.1f} GiB free, expected {settings['disk-gib']}")
    if any(sign in proxy_setting() for sign in " \t\n\"'\\"):
        found.append("HTTPS_PROXY: holds a space, a quote or a backslash; write it as %20, %22, %27 or %5C")
    if settings["gpu"] and not works("nvidia-smi", "-L"):
        found.append("GPU: nvidia-smi finds none; install its driver, or ask for a kit without --gpu")
    return found


def works(*words: str) -> bool:
    """Whether a command exists and succeeds."""
    with contextlib.suppress(OSError):
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    return False


def place_faults(hospital: str) -> list[str]:
    """Folders and files that are there already and that others may change or read."""
    found: list[str] = []
    for path in filter(Path.exists, (CONFIG, COPIES, UNITS)):
        if path.stat().st_uid != 0 or path.stat().st_mode & 0o022:
            found += [f"{path}: others than root may write into it; chown root {path}; chmod go-w {path}"]
    for path in filter(Path.exists, (CONFIG / hospital, DATA / "site", DATA / "images")):
        if path.stat().st_mode & 0o007:
            found += [f"{path}: open to every account; chmod o-rwx {path}"]
    for path in (DATA, DATA / "site", DATA / "images"):
        if path.is_symlink():
            found += [f"{path}: is a link, expected a folder of its own; mount or copy images into it"]
        elif path.exists() and path.stat().st_uid not in (0, uid_of("panfm")):
            found += [
                f"{path}: belongs to account {path.stat().st_uid}, expected root or panfm; its owner would change"
            ]
    for path in (KIT, *KIT.parents):
        is_open = path.stat().st_mode & 0o022 and (path == KIT or not path.stat().st_mode & stat.S_ISVTX)
        if is_open or path.stat().st_uid not in (0, os.geteuid()):
            found += [f"{path}: another account may write into it; unpack the kit in a folder of root's"]
    for link in filter(Path.exists, (Path("/opt") / name for name in ENVIRONMENTS)):
        if not link.is_symlink():
            found += [f"{link}: is there and not from a kit; move it away"]
    return found


def uid_of(account: str) -> int:
    """Number of an account; -1 if it is not there."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(account).pw_uid
    return -1


def proxy_setting() -> str:
    """The proxy that the environment names, or an earlier run has written; empty for none."""
    if named := os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return named
    with contextlib.suppress(OSError):
        return (CONFIG / "proxy.env").read_text(encoding="utf-8").strip().removeprefix("HTTPS_PROXY=")
    return ""


def network_faults(server: str, port: int) -> list[str]:
    """Name, connection, certificate, and clock: what a SuperNode needs, over the proxy where one is set."""
    named = proxy_setting()
    proxy = urllib.parse.urlsplit(named if "//" in named else f"http://{named}") if named else None
    host, through = (proxy.hostname, proxy.port or 80) if proxy else (server, port)
    try:
        socket.getaddrinfo(host, through)
    except OSError as error:
        return [f"DNS: {host}: {error.strerror}; this machine must know the name"]
    connection = http.client.HTTPSConnection(
        str(host), through, timeout=TIMEOUT_S, context=ssl.create_default_context(cafile=KIT / "ca.crt")
    )
    if proxy:
        connection.set_tunnel(server, port, headers=proxy_headers(proxy))
    where = f"{server}:{port}" + (f" through the proxy {host}:{through}" if proxy else "")
    try:
        connection.request("GET", "/")
        date = connection.getresponse().headers["Date"]
    except ssl.SSLError as error:
        return [
            f"TLS: {where}: {getattr(error, 'verify_message', '') or error}; ca.crt of the kit does not vouch for it"
        ]
    except (OSError, http.client.HTTPException) as error:
        return [
            f"network: {where}: {error}; outbound TCP to it must be open" + ("" if proxy else ", or set HTTPS_PROXY")
        ]
    finally:
        connection.close()
    apart = time.time() - email.utils.parsedate_to_datetime(date).timestamp() if date else 0.0
    if abs(apart) > CLOCK_S:
        return [f"clock: {abs(apart):.0f} s {'ahead of' if apart > 0 else 'behind'} the coordinator's; set it (NTP)"]
    return []


def proxy_headers(proxy: urllib.parse.SplitResult) -> dict[str, str]:
    """The header that a proxy with a password asks for (http://user:password@proxy:port)."""
    if not proxy.username:
        return {}
    words = f"{urllib.parse.unquote(proxy.username)}:{urllib.parse.unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(words.encode()).decode()}"}


# --- What is made ---


def install(settings: dict) -> None:
    """Make what the first lines of this file list. What is there already is kept, or replaced by the kit's."""
    os.umask(0o022)
    kit = copy_kit()
    for name in ACCOUNTS:
        make_account(name)
    run("usermod", "-a", "-G", "flower", "panfm")
    for name, requirements in ENVIRONMENTS.items():
        make_environment(name, kit, requirements)
    make_folder(DATA, "root", "root", 0o755)
    for name in ("images", "site"):
        make_folder(DATA / name, "panfm", "panfm", 0o700)
    for name in ("site.toml", "manifest.csv"):
        if not (DATA / "site" / name).exists():
            put((kit / name).read_bytes(), DATA / "site" / name, "panfm", 0o600)
    make_folder(CONFIG, "root", "flower", 0o750)
    put((kit / "ca.crt").read_bytes(), CONFIG / "ca.crt", "flower", 0o440)
    if not (CONFIG / settings["hospital"]).exists():
        make_key(settings["hospital"])
    install_units(kit)


def copy_kit() -> Path:
    """Copy the kit to where root alone writes, check the copy, and return its path."""
    sums = (KIT / "SHA256SUMS").read_bytes()
    copy = COPIES / hashlib.sha256(sums).hexdigest()[:16]
    if copy != KIT:
        COPIES.mkdir(mode=0o755, exist_ok=True)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(KIT, copy, copy_function=shutil.copyfile)
    found = altered(copy)
    if found or (copy / "SHA256SUMS").read_bytes() != sums:
        raise RuntimeError("; ".join(found) or f"{KIT}: changed while it was copied")
    return copy


def make_account(name: str) -> None:
    """Make a system account with a group of its name, without a shell."""
    with contextlib.suppress(KeyError):
        pwd.getpwnam(name)
        return
    run("useradd", "--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin", name)


def make_environment(name: str, kit: Path, requirements: str) -> None:
    """Fill a new environment with the packages of the kit, then let /opt/NAME lead to it."""
    digest = hashlib.sha256((kit / requirements).read_bytes()).hexdigest()[:12]
    folder, link = Path(f"/opt/{name}-{digest}"), Path("/opt") / name
    done = folder / "installed"
    if not done.exists():
        print(f"{folder}: installing {requirements} ...", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder, "panfm-install", "panfm-install", 0o755)
        as_installer(kit, sys.executable, "-m", "venv", str(folder))
        wheels = ["--no-index", "--find-links", "wheels"] if (kit / "wheels").is_dir() else []
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-cache-dir", "--require-hashes", "--only-binary", ":all:", *wheels, "-r", requirements]
        as_installer(kit, *pip)
        run("chown", "-R", "-h", "root:root", str(folder))
        done.touch()
    link.with_suffix(".new").unlink(missing_ok=True)
    link.with_suffix(".new").symlink_to(folder)
    link.with_suffix(".new").rename(link)


def as_installer(folder: Path, *words: str) -> None:
    """Run a command in a folder, under the account that owns nothing else."""
    run("runuser", "-u", "panfm-install", "--", "env", "HOME=/nonexistent", *words, cwd=folder)


def make_folder(path: Path, owner: str, group: str, mode: int) -> None:
    """Make a folder, or give one that is there its owner and mode."""
    path.mkdir(parents=True, exist_ok=True)
    shutil.chown(path, owner, group)
    path.chmod(mode)


def put(content: bytes, target: Path, group: str, mode: int) -> None:
    """Write a file in one step; in /srv/panfm it belongs to its group's account, elsewhere to root."""
    partial = target.with_name(f".{target.name}.new")
    partial.unlink(missing_ok=True)
    # The folder may belong to another account: no link in it is followed, and what is opened here is new.
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(content)
        os.fchown(file.fileno(), pwd.getpwnam(group if DATA in target.parents else "root").pw_uid, gid_of(group))
        os.fchmod(file.fileno(), mode)
    partial.rename(target)


def gid_of(group: str) -> int:
    """Number of a group."""
    return grp.getgrnam(group).gr_gid


def make_key(hospital: str) -> None:
    """Make the SuperNode's key, readable to its account alone; a key that is there is never replaced."""
    key, partial = CONFIG / hospital, CONFIG / f".{hospital}.new"
    for path in (partial, CONFIG / f"{partial.name}.pub"):
        path.unlink(missing_ok=True)
    run("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", hospital, "-f", str(partial))
    shutil.chown(partial, "flower", "root")
    partial.chmod(0o400)
    (CONFIG / f"{hospital}.pub").unlink(missing_ok=True)  # of an earlier key; `tell` makes one that is missing
    os.link(partial, key)  # fails where a key is there
    (CONFIG / f"{partial.name}.pub").replace(CONFIG / f"{hospital}.pub")
    partial.unlink()


def renew_key(hospital: str) -> None:
    """Put the key aside under the time, make a new one, and start the SuperNode with it."""
    key = CONFIG / hospital
    if not key.exists():
        raise RuntimeError(f"{key}: no key to renew; install first")
    aside = key.with_name(f"{hospital}.until-{time.strftime('%Y%m%dT%H%M%S')}")
    os.link(key, aside)
    key.unlink()
    make_key(hospital)
    run("systemctl", "restart", "panfm-supernode.service")


def install_units(kit: Path) -> None:
    """Install the units and the rules of isolation, start them, and see that they stay."""
    for rules in sorted((kit / "units").glob("*.nft")):
        make_folder(RULES, "root", "root", 0o755)
        put(rules.read_bytes(), RULES / rules.name, "root", 0o644)
    for unit in sorted((kit / "units").glob("*.service")):
        put(unit.read_bytes(), UNITS / unit.name, "root", 0o644)
    set_proxy(proxy_setting())
    run("systemctl", "daemon-reload")
    run("systemctl", "enable", "--now", *SERVICES)
    run("systemctl", "restart", "panfm-worker.service", "panfm-supernode.service")
    watch_services()


def set_proxy(proxy: str) -> None:
    """Let the SuperNode use a proxy, or none."""
    drop_in = UNITS / "panfm-supernode.service.d"
    if not proxy:
        (drop_in / "proxy.conf").unlink(missing_ok=True)
        return
    put(f"HTTPS_PROXY={proxy}\n".encode(), CONFIG / "proxy.env", "root", 0o600)  # it may hold a password
    make_folder(drop_in, "root", "root", 0o755)
    put(f"[Service]\nEnvironmentFile={CONFIG}/proxy.env\n".encode(), drop_in / "proxy.conf", "root", 0o644)


def watch_services() -> None:
    """Raise RuntimeError if a unit does not stay; a SuperNode is started again until the coordinator lets it in."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        for name in SERVICES:
            done = subprocess.run(["systemctl", "is-active", name], capture_output=True, text=True, check=False)
            state = done.stdout.strip() or "unknown"
            if state not in ({"active", "activating"} if name == SERVICES[-1] else {"active"}):
                raise RuntimeError(f"{name}: found {state}, expected active; `journalctl -u {name}` tells why")
        if time.monotonic() > deadline:
            return
        time.sleep(1)


def run(*words: str, cwd: Path | None = None) -> None:
    """Run a command. Raises RuntimeError with its last line of error if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
        raise RuntimeError(f"{' '.join(words[:8])}: {last}")


def fingerprint(public_key: Path) -> tuple[str, str]:
    """SHA-256 of a public key in groups of four digits to read out, and as `ssh-keygen -l` prints it."""
    digest = hashlib.sha256(base64.b64decode(public_key.read_text(encoding="ascii").split()[1])).digest()
    digits = digest.hex()
    groups = " ".join(digits[at : at + 4] for at in range(0, len(digits), 4))
    return groups, f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def tell(settings: dict) -> None:
    """Say what to send and what to read out, and how the site is seen."""
    private, key = CONFIG / settings["hospital"], CONFIG / f"{settings['hospital']}.pub"
    if not key.exists():  # ended between the two files
        done = subprocess.run(["ssh-keygen", "-y", "-f", private], capture_output=True, text=True, check=True)
        key.write_text(f"{done.stdout.strip()} {settings['hospital']}\n", encoding="ascii")
    key.chmod(stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IROTH)
    groups, as_ssh = fingerprint(key)
    print(f"done: {settings['hospital']} is installed; its SuperNode is let in once the coordinator has registered it")
    print(f"send to the coordinator: {key}")
    print(f"read out by telephone:   {groups}")
    print(f"                         ({as_ssh})")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
