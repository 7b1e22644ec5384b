"""Machines of a small federation on this one: own mounts, network, processes and accounts, by namespaces (root only).

What systemd does is done by a stand-in (`stand_in_systemctl.py`), and what a package index holds by wheels that each
lead to this environment's packages, so that pip resolves, checks and installs as anywhere else, in seconds.
"""

import base64
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Self

HOME = "/root"
"""Of root, empty on each machine."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SYSTEMCTL = Path(__file__).with_name("stand_in_systemctl.py")
_KEPT = ("Name", "Version", "Requires-Dist", "Requires-Python", "Provides-Extra")
_MOUNTS = """
set -e
mount -t tmpfs -o mode=755,size=100g none /mnt
for place in etc opt srv var/lib var/log usr/local; do
  layer="/mnt/$(echo "$place" | tr / -)"
  mkdir -p "$layer/upper" "$layer/work"
  mount -t overlay overlay -o "lowerdir=/$place,upperdir=$layer/upper,workdir=$layer/work" "/$place"
done
mount -t tmpfs -o mode=755 none /run
mkdir /run/wheels /run/units
mount --bind "$1" /run/wheels
mount -t tmpfs -o mode=700 none /root
install -m 755 "$2" /usr/local/bin/systemctl
rm -f /etc/nginx/sites-enabled/default
ip link set lo up
touch /run/ready
sleep infinity &
wait
"""


def can_be_made() -> bool:
    """Whether this machine can make such machines: root, namespaces, and a system Python like ours."""
    if os.geteuid() != 0 or not all(shutil.which(name, path=PATH) for name in ("unshare", "nsenter", "ip", "nginx")):
        return False
    version = f"import sys, ensurepip, venv; assert sys.version_info[:2] == {sys.version_info[:2]}"
    if subprocess.run(["/usr/bin/python3", "-c", version], capture_output=True, check=False).returncode:
        return False
    trial = "mount -t tmpfs none /mnt && mkdir /mnt/u /mnt/w && "
    trial += "mount -t overlay overlay -o lowerdir=/etc,upperdir=/mnt/u,workdir=/mnt/w /etc"
    words = ["unshare", "--mount", "--net", "--pid", "--fork", "sh", "-c", trial]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


class Machine:
    """One machine; all that runs on it ends with the block."""

    def __init__(self, wheels: Path) -> None:
        words = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        words += ["bash", "-c", _MOUNTS, "machine", str(wheels), str(SYSTEMCTL)]
        self._outer = subprocess.Popen(words, stdin=subprocess.DEVNULL)
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        deadline = time.monotonic() + 30
        self.pid = ""
        while not (self.pid and self.run("test -e /run/ready").returncode == 0):
            assert time.monotonic() < deadline, "the machine does not come up"
            assert self._outer.poll() is None, "the machine ended"
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                self.pid = children.read_text(encoding="ascii").strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._outer.kill()
        self._outer.wait()

    def run(self, command: str, *, folder: str = "/") -> subprocess.CompletedProcess[str]:
        """Run a command line as root, as a person would who has just logged in."""
        words = ["nsenter", "--target", self.pid, "--mount", "--net", "--pid", "--", "env", "-i", f"PATH={PATH}"]
        words += [f"HOME={HOME}", "PIP_NO_INDEX=1", "PIP_FIND_LINKS=/run/wheels", "PIP_CONFIG_FILE=/dev/null"]
        words += ["PIP_NO_COMPILE=1", "PYTHONDONTWRITEBYTECODE=1", "OMP_NUM_THREADS=1"]
        words += ["bash", "-c", f"umask 022; cd {folder} || exit\n{command}"]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)

    def do(self, command: str, *, folder: str = "/") -> str:
        """Run a command that must succeed; returns what it prints."""
        done = self.run(command, folder=folder)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout

    def write(self, path: str, content: bytes) -> None:
        """Put a file there, as by mail or a stick."""
        text = base64.b64encode(content).decode()
        words = ["nsenter", "--target", self.pid, "--mount", "--", "bash", "-c", 'umask 022; base64 -d >"$0"', path]
        subprocess.run(words, input=text.encode(), check=True)

    def read(self, path: str) -> bytes:
        """A file's content."""
        words = ["nsenter", "--target", self.pid, "--mount", "--", "cat", path]
        return subprocess.run(words, capture_output=True, check=True).stdout


def connect(hub: Machine, others: list[Machine], name: str) -> None:
    """Give each of the others a wire to the hub, which it knows under this name."""
    for number, other in enumerate(others, 1):
        ends = [f"to-{number}", "netns", hub.pid, "type", "veth", "peer", "name", "eth0", "netns", other.pid]
        subprocess.run(["ip", "link", "add", *ends], check=True)
        hub.do(f"ip addr add 10.77.{number}.1/24 dev to-{number} && ip link set to-{number} up")
        other.do(f"ip addr add 10.77.{number}.2/24 dev eth0 && ip link set eth0 up")
        other.do(f"echo 10.77.{number}.1 {name} >>/etc/hosts")


def write_wheels(folder: Path) -> None:
    """Write a wheel of each package of this environment but panfm, which leads to the package itself."""
    folder.mkdir(mode=0o755)
    place = sysconfig.get_paths()["purelib"]
    for distribution in {each.metadata["Name"]: each for each in distributions(path=[place])}.values():
        if distribution.metadata["Name"] != "panfm":
            _write_wheel(folder, distribution, place)


def _write_wheel(folder: Path, distribution: Distribution, place: str) -> None:
    name = re.sub(r"[-_.]+", "_", distribution.metadata["Name"]).lower()
    info = f"{name}-{distribution.version}.dist-info"
    lines = [f"{key}: {value}" for key in _KEPT for value in distribution.metadata.get_all(key) or ()]
    files = {
        f"stand_in_{name}.pth": f"{place}\n",
        f"{info}/METADATA": "\n".join(["Metadata-Version: 2.1", *lines, ""]),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": distribution.read_text("entry_points.txt") or "",
    }
    record = [f"{path},sha256={_digest(text)},{len(text.encode())}" for path, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""])
    with zipfile.ZipFile(folder / f"{name}-{distribution.version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
