"""A coordinator and two hospitals are set up by the commands of docs/kit.md and of the kits' READMEs, word for word.

Each is a machine of its own (`kit_hosts.py`), with the accounts, files and processes that the commands make there.
"""

import io
import re
import subprocess
import tarfile
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from server.flower_cli import ROOT
from tests.docs.page_commands import steps
from tests.docs.page_workplace import write_scan
from tests.federation.kit_hosts import HOME, Machine, can_be_made, connect, write_wheels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(not can_be_made(), reason="needs root, namespaces, nginx and a system Python like this one"),
]
SERVER = "coordinator.example.org"
NAMES = ("north-hospital", "south-hospital")
KITS = "/var/lib/panfm-coordinator/kits"
MOST = 6
ONLINE_S = 120.0


def commands(text: str) -> list[str]:
    return [step.text for step in steps(text)]


def page_section(title: str) -> list[str]:
    text = (ROOT / "docs" / "kit.md").read_text(encoding="utf-8")
    [section] = re.findall(rf"^## {title}$(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    return commands(section)


class Federation:
    """What the commands printed, and how many each side needed."""

    def __init__(self, coordinator: Machine, hospitals: dict[str, Machine]) -> None:
        self.coordinator, self.hospitals = coordinator, hospitals
        self.counts: dict[str, int] = {}
        self.printed: dict[str, str] = {}
        self.kits: dict[str, bytes] = {}

    def at_coordinator(self, command: str, name: str = NAMES[0], fingerprint: str = "") -> str:
        """Run a command of the page, with a hospital's name in it, and what it read out."""
        text = command.replace(NAMES[0], name).replace("WORDS", fingerprint)
        return self.coordinator.do(text, folder="/srv/clone")

    def set_up(self) -> None:
        *first, kit, register, listing = page_section("Coordinator: six commands")
        for command in first:
            self.at_coordinator(command)
        for name, machine in self.hospitals.items():
            self.at_coordinator(kit, name)
            self.kits[name] = self.coordinator.read(f"{KITS}/{name}.tar.gz")
            readme = self.coordinator.read(f"{KITS}/{name}.tar.gz.README.txt")
            machine.write(f"{HOME}/{name}.tar.gz", self.kits[name])
            for image in sorted(Path("images").iterdir()):
                machine.write(f"{HOME}/{image.name}", image.read_bytes())
            hospitals_own = commands(readme.decode())
            self.counts[name] = len(hospitals_own)
            for command in hospitals_own:
                if "site init" in command:
                    machine.do(f"cp {HOME}/*.nii.gz /srv/panfm/images")  # "put your images into"
                self.printed[name] = self.printed.get(name, "") + machine.do(command, folder=HOME)
            self.coordinator.write(f"{KITS}/{name}.pub", machine.read(f"/etc/panfm/{name}.pub"))
            self.at_coordinator(register, name, self.fingerprint(name))
        self.counts["coordinator"] = len([*first, kit, register, listing])
        self.wait_for(set(NAMES))
        self.printed["coordinator"] = self.at_coordinator(listing)

    def fingerprint(self, name: str) -> str:
        return re.findall(r"read out by telephone: +(.*)", self.printed[name])[-1]

    def online(self) -> set[str]:
        return set(re.findall(r"^(\S+)  online ", self.coordinator.do("panfm-server hospitals"), re.MULTILINE))

    def wait_for(self, names: set[str]) -> None:
        deadline = time.monotonic() + ONLINE_S
        while self.online() != names:
            logs = [machine.run("tail -5 /run/units/*.log").stdout for machine in self.hospitals.values()]
            assert time.monotonic() < deadline, logs
            time.sleep(3)


@pytest.fixture(scope="module")
def federation():
    with (
        tempfile.TemporaryDirectory(prefix="panfm-kit-test-") as name,
        ExitStack() as stack,
        pytest.MonkeyPatch.context() as patch,
    ):
        folder = Path(name)
        folder.chmod(0o755)
        patch.chdir(folder)
        write_wheels(folder / "wheels")
        (folder / "images").mkdir()
        for number in range(4):
            write_scan(np.random.default_rng(number), f"images/p{number:02}_brain_T1.nii.gz")
        coordinator, *others = (stack.enter_context(Machine(folder / "wheels")) for _ in range(3))
        connect(coordinator, others, SERVER)
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder / "clone")], check=True)
        coordinator.do(f"cp -r {folder / 'clone'} /srv/clone && chown -R root: /srv/clone")
        federation = Federation(coordinator, dict(zip(NAMES, others, strict=True)))
        federation.set_up()
        yield federation


def test_two_hospitals_are_online_after_six_commands_each(federation):
    assert federation.counts == dict.fromkeys(("coordinator", *NAMES), MOST)
    assert federation.online() == set(NAMES)
    for name in NAMES:
        assert f"this machine is ready for {name}: no fault" in federation.printed[name]
        assert "worker" in federation.printed[name].split("read out by telephone")[1]


def test_no_kit_has_a_secret_or_names_another_hospital(federation):
    """The lines of all private keys and secrets of the coordinator's are sought in both kits."""
    find = "find /etc/panfm /var/lib/panfm-coordinator -name '*.key' -print0 -o -name '*.secret' -print0"
    paths = federation.coordinator.do(find).split("\0")[:-1]
    assert any(path.endswith("superexec.secret") for path in paths)
    assert any(path.endswith(".key") for path in paths)
    for name, other in (NAMES, NAMES[::-1]):
        with tarfile.open(fileobj=io.BytesIO(federation.kits[name])) as archive:
            files = {entry.name: archive.extractfile(entry).read() for entry in archive if entry.isfile()}
        content = b"\n".join(files.values())
        assert other.encode() not in content
        assert b"PRIVATE KEY" not in content
        for path in paths:
            secret = federation.coordinator.read(path)
            lines = [line for line in secret.splitlines() if len(line) > 20 and not line.startswith(b"-----")] or [
                secret
            ]
            assert [line for line in lines if line in content] == [], path


def test_the_same_commit_gives_the_same_bytes(federation):
    name = NAMES[0]
    federation.coordinator.do(f"runuser -u panfm-coordinator -- mkdir {KITS}/again")
    federation.coordinator.do(f"panfm-server kit {name} --server {SERVER} --out again/{name}.tar.gz")
    assert federation.coordinator.read(f"{KITS}/again/{name}.tar.gz") == federation.kits[name]


def test_nobody_reads_what_is_the_hospitals(federation):
    machine = federation.hospitals[NAMES[0]]
    for path in (f"/etc/panfm/{NAMES[0]}", "/srv/panfm/site/site.toml", "/srv/panfm/images"):
        assert machine.run(f"runuser -u nobody -- head -c 1 {path}").returncode != 0, path
    assert machine.run(f"runuser -u panfm -- head -c 1 /etc/panfm/{NAMES[0]}").returncode != 0
    assert machine.run("runuser -u flower -- ls /srv/panfm/site").returncode != 0
    assert machine.do("find /opt/panfm-* /etc/panfm ! -user root ! -path '/etc/panfm/north-hospital'") == ""


def test_a_second_installation_keeps_key_and_limits(federation):
    machine, folder = federation.hospitals[NAMES[0]], f"{HOME}/panfm-kit-{NAMES[0]}"
    machine.do("echo '# mine' >>/srv/panfm/site/site.toml")
    before = machine.do("sha256sum /etc/panfm/* /srv/panfm/site/site.toml; readlink /opt/panfm")
    machine.do(f"python3 -I {folder}/install.py")
    assert machine.do("sha256sum /etc/panfm/* /srv/panfm/site/site.toml; readlink /opt/panfm") == before


def test_the_coordinator_is_set_up_again_between_runs_only(federation):
    """With a newer commit: its source and units take the place of the old, and no key changes."""
    coordinator = federation.coordinator
    set_up = next(command for command in page_section("Coordinator: six commands") if "coordinator.sh" in command)
    state = "readlink -f /opt/panfm-source; sha256sum /etc/panfm/*; pgrep -u panfm-coordinator -f bin/flower-superlink"
    edit = "echo '# newer' >>configs/deployment/hosts/panfm-superlink.service && git -c user.name=x -c user.email=x@x"
    coordinator.do(f"{edit} commit --quiet --all --message newer", folder="/srv/clone")
    before = coordinator.do(state)
    coordinator.do("runuser -u panfm-coordinator -- bash -c 'exec -a flwr-serverapp sleep 300' >/dev/null 2>&1 &")
    refused = coordinator.run(set_up, folder="/srv/clone")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "a run is under way, nothing was changed; expected none (panfm-server stop RUN): process " in refused.stderr
    assert coordinator.do(state) == before
    coordinator.do("pkill -f ^flwr-serverapp")
    federation.at_coordinator(set_up)
    assert "# newer" in coordinator.do(
        "cat /etc/systemd/system/panfm-superlink.service /opt/panfm-source/configs/deployment/hosts/*"
    )
    after = coordinator.do(state)
    for old, new, is_same in zip(before.splitlines(), after.splitlines(), [False, *[True] * 5, False], strict=True):
        assert (old == new) == is_same, (old, new)
    other = coordinator.run(set_up.replace(SERVER, "other.example.org"), folder="/srv/clone")
    assert "/etc/panfm/server.pem: not for other.example.org" in other.stderr
    federation.wait_for(set(NAMES))


def test_every_fault_is_a_line_and_nothing_is_changed(federation):
    """A changed unit, a wrong name and a folder open to all, in one go."""
    machine, folder = federation.hospitals[NAMES[0]], f"{HOME}/faulty"
    machine.do(f"cp -r {HOME}/panfm-kit-{NAMES[0]} {folder} && echo >>{folder}/units/panfm-worker.service")
    machine.do(f"sed -i s/{SERVER}/nowhere.invalid/ {folder}/kit.json && chmod o+rx /srv/panfm/site")
    done = machine.run(f"python3 -I {folder}/install.py")
    machine.do("chmod o-rx /srv/panfm/site")
    assert done.returncode == 1
    faults = [line for line in done.stdout.splitlines() if line.startswith("FAULT")]
    for word in (
        "units/panfm-worker.service: its SHA-256",
        "kit.json: its SHA-256",
        "/srv/panfm/site: open",
        "DNS: nowhere",
    ):
        assert sum(word in line for line in faults) == 1, (word, faults)
    assert len(faults) == 4
    assert "4 faults, nothing was changed" in done.stdout


def test_a_key_is_renewed_and_a_hospital_leaves(federation):
    name, machine = NAMES[1], federation.hospitals[NAMES[1]]
    at_hospital, at_coordinator = page_section("A new key")
    federation.printed[name] = machine.do(at_hospital.replace(*NAMES), folder=HOME)
    federation.coordinator.write(f"{KITS}/{name}.pub", machine.read(f"/etc/panfm/{name}.pub"))
    wrong = federation.coordinator.run(at_coordinator.replace(*NAMES).replace("WORDS", "0000 " * 16))
    assert (wrong.returncode, "another than was told" in wrong.stderr) == (1, True)
    federation.at_coordinator(at_coordinator, name, federation.fingerprint(name))
    federation.wait_for(set(NAMES))
    [command] = page_section("A hospital that leaves")
    federation.at_coordinator(command, name)
    machine.do("systemctl restart panfm-supernode.service")
    deadline = time.monotonic() + ONLINE_S
    while "Failed to activate" not in (log := machine.do("tail -c 2000 /run/units/panfm-supernode.service.log")):
        assert time.monotonic() < deadline, log
        time.sleep(2)
    assert federation.online() == {NAMES[0]}
    listed = federation.coordinator.do("panfm-server hospitals")
    assert len(re.findall(rf"^{name}  revoked \S+  node \d+", listed, re.MULTILINE)) == 2
    refused = federation.coordinator.run(at_coordinator.replace(*NAMES).replace("WORDS", federation.fingerprint(name)))
    assert "expected a new key" in refused.stderr


def test_a_site_trusts_two_authorities_while_one_is_replaced(federation):
    """The page's commands for new certificates, then the coordinator's change to the new ones."""
    name, machine, coordinator = NAMES[0], federation.hospitals[NAMES[0]], federation.coordinator
    make, join, kit, replace, restart = page_section("New certificates")
    for command in (make, join, kit):
        federation.at_coordinator(command)
    archive = f"{name}-renewal.tar.gz"
    machine.do(f"mkdir {HOME}/renewal")
    machine.write(f"{HOME}/renewal/{archive}", coordinator.read(f"{KITS}/{archive}"))
    machine.do(f"tar -xzf {archive} && python3 -I panfm-kit-{name}/install.py", folder=f"{HOME}/renewal")
    assert machine.read("/etc/panfm/ca.crt") == coordinator.read(f"{KITS}/both.crt")
    for command in (replace, restart):
        federation.at_coordinator(command)
    assert (
        coordinator.do("stat -c '%U %a' /etc/panfm/server.key /etc/panfm/ca.crt").split()
        == ["panfm-coordinator", "600"] * 2
    )
    machine.do("systemctl restart panfm-supernode.service")
    deadline = time.monotonic() + ONLINE_S
    while name not in (coordinator.run("panfm-server hospitals").stdout and federation.online()):
        assert time.monotonic() < deadline
        time.sleep(3)
