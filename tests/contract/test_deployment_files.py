"""Every command and every flag in the shipped units and the compose file exists; systemd accepts the units."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from sqlalchemy import make_url

HOSTS = Path(__file__).resolve().parents[2] / "configs" / "deployment" / "hosts"
BIN = Path(sys.executable).parent
UNITS = sorted(HOSTS.glob("*.service"))
ISOLATION = HOSTS / "panfm-isolation@.service"
WATCHDOG = HOSTS / "panfm-watchdog.service"
SERVERS = [unit for unit in UNITS if unit not in (ISOLATION, WATCHDOG)]
SERVICES = yaml.safe_load((HOSTS / "compose.yaml").read_text(encoding="utf-8"))["services"]


def start_command(unit: Path) -> str:
    """`ExecStart`, its lines joined."""
    text = unit.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)[1]


COMMANDS = {unit.name: start_command(unit) for unit in (*SERVERS, WATCHDOG)}
COMMANDS |= {f"compose: {name}": service["command"] for name, service in SERVICES.items()}


@cache
def help_of(*words: str) -> str:
    return subprocess.run([BIN / words[0], *words[1:], "--help"], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow  # each Flower command takes seconds to say what it can
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_and_flags_exist(name):
    program, *words = shlex.split(COMMANDS[name])
    program = program.removeprefix("/opt/flower/bin/" if "supernode" in name else "/opt/panfm/bin/")
    assert program in {"panfm", "python", "flower-superlink", "flower-superexec", "flower-supernode"}
    known = help_of(program, *words[: {"panfm": 2, "python": 3}.get(program, 0)])
    for flag in [word for word in words if word.startswith("-")]:
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", known), flag


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_accepts_the_units(unit, tmp_path):
    """With this machine's commands in place of those under /opt."""
    for each in UNITS:
        text = re.sub("/opt/(panfm|flower)/bin", str(BIN), each.read_text(encoding="utf-8"))
        text = text.replace("/usr/sbin/nft", "/bin/true")  # a package that this machine may lack
        (tmp_path / each.name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / unit.name], capture_output=True, text=True, check=False
    )
    assert (done.returncode, [line for line in done.stderr.splitlines() if unit.name in line]) == (0, [])


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_accepts_the_units_of_the_page_without_root(tmp_path):
    page = (HOSTS.parents[2] / "docs" / "without-root.md").read_text(encoding="utf-8")
    units = re.findall(r"^```text\n# (\S+[.]service)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in units] == ["panfm-worker.service", "panfm-supernode.service"]
    for name, text in units:
        (tmp_path / name).write_text(text.replace("%h/panfm/bin", str(BIN)), encoding="utf-8")
    words = ["systemd-analyze", "--user", "verify", "--man=no", *(tmp_path / name for name, _ in units)]
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, [line for line in done.stderr.splitlines() if str(tmp_path) in line]) == (0, [])
    for name, text in units:
        program, *words = shlex.split(re.search("^ExecStart=(.*)$", text.replace("\\\n", " "), re.MULTILINE)[1])
        shipped = shlex.split(start_command(HOSTS / name))
        assert Path(program).name == Path(shipped[0]).name
        assert [word for word in words if word.startswith("--")] == [each for each in shipped if each.startswith("--")]


@pytest.mark.parametrize("unit", SERVERS, ids=lambda unit: unit.name)
def test_units_start_again_what_ends(unit):
    text = unit.read_text(encoding="utf-8")
    is_of_one_run = unit.name == "panfm-run@.service"  # which ends
    assert f"\nRestart={'on-failure' if is_of_one_run else 'always'}\n" in text
    assert re.search(r"^RestartSec=[1-9]\d*$", text, re.MULTILINE)


@pytest.mark.parametrize("unit", SERVERS, ids=lambda unit: unit.name)
def test_units_are_sandboxed_and_flowers_do_not_start_without_isolation(unit):
    """The tests of an account without rights (tests/federation/test_as_nobody.py) rely on these lines."""
    lines = unit.read_text(encoding="utf-8").splitlines()
    assert {"UMask=0077", "NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectProc=invisible"} <= set(lines)
    role = "site" if unit.name == "panfm-supernode.service" else "coordinator"
    if unit.name == "panfm-worker.service":
        assert "PrivateNetwork=yes" in lines
        return
    assert f"Requires=panfm-isolation@{role}.service" in lines
    [after] = [line for line in lines if line.startswith("After=")]
    assert f"panfm-isolation@{role}.service" in after


def test_the_watchdog_is_called_by_its_timer_and_opens_no_network():
    lines = WATCHDOG.read_text(encoding="utf-8").splitlines()
    assert {"Type=oneshot", "PrivateNetwork=yes", "ProtectSystem=strict", "NoNewPrivileges=yes"} <= set(lines)
    assert "OnUnitActiveSec=5min" in WATCHDOG.with_suffix(".timer").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("role", "unit"), [("coordinator", "panfm-superlink"), ("site", "panfm-supernode")])
def test_the_rules_guard_the_port_that_the_unit_opens_for_its_account(role, unit):
    rules = (HOSTS / f"panfm-isolation-{role}.nft").read_text(encoding="utf-8")
    words = shlex.split(COMMANDS[f"{unit}.service"])
    [account] = re.findall(r"^User=(.*)$", (HOSTS / f"{unit}.service").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.search(rf"^define \w+_port = {words[words.index('--port') + 1]}$", rules, re.MULTILINE)
    assert re.search(rf'^define \w+_accounts? = .*"{account}"', rules, re.MULTILINE)


@pytest.mark.parametrize(
    "name", [name for name in COMMANDS if not {"supernode", "worker", "watchdog"} & set(re.split(r"\W", name))]
)
def test_nothing_is_installed_at_run_time(name):
    """The coordinator's processes are told not to; a SuperNode does only if it is told to."""
    unit, service = HOSTS / name, SERVICES.get(name.removeprefix("compose: "), {})
    words = (
        unit.read_text(encoding="utf-8") if unit.exists() else "\n".join(map("=".join, service["environment"].items()))
    )
    assert "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1" in words
    assert not any("--allow-runtime-dependency-installation" in command for command in COMMANDS.values())


def test_containers_are_kept_apart():
    """The worker has no network, and shares no account and no folder of images with the SuperNode."""
    worker, supernode = SERVICES["worker"], SERVICES["supernode"]
    assert worker["network_mode"] == "none"
    assert worker["user"] != supernode["user"]
    shared = {each.split(":")[0] for each in worker["volumes"]} & {each.split(":")[0] for each in supernode["volumes"]}
    assert shared == {"/run/panfm"}
    assert {service["restart"] for service in SERVICES.values()} == {"always"}


@pytest.mark.parametrize("name", [name for name in COMMANDS if "superlink" in name])
def test_the_superlink_keeps_its_database_on_disk_and_waits_for_its_lock(name):
    words = shlex.split(COMMANDS[name])
    url = make_url(words[words.index("--database") + 1])
    assert url.query == {"plugin": "panfm"}
    assert Path(url.database).is_absolute()


def test_containers_rules_and_units_name_the_same_accounts():
    """compose.yaml says which account of the machine has which number; rules and units know it by name."""
    text = (HOSTS / "compose.yaml").read_text(encoding="utf-8")
    numbers = {name: number for number, name in re.findall(r"^#.*useradd .*--uid (\d+) .* (\S+)$", text, re.MULTILINE)}
    users = {f"{numbers[name]}:{numbers[name]}" for name in ("panfm-coordinator", "flower")}
    assert users == {service["user"] for name, service in SERVICES.items() if name != "worker"}
    assert SERVICES["worker"]["user"] == f"{numbers['panfm']}:{numbers['panfm']}"
    named = [re.findall(r"^User=(.*)$", unit.read_text(encoding="utf-8"), re.MULTILINE) for unit in SERVERS]
    assert {account for accounts in named for account in accounts} == {*numbers}
    rules = "".join(re.findall("^define .*", "".join(path.read_text() for path in HOSTS.glob("*.nft")), re.MULTILINE))
    assert set(re.findall(r'"([\w-]+)"', rules)) == {*numbers} - {"panfm"} | {"www-data"}


def test_the_images_own_the_folder_that_their_volume_covers():
    made = [" ".join(words) for words in containerfile() if words[:2] == ["RUN", "install"]]
    assert made == ["RUN install -d -o 10002 -g 10002 -m 0700 /var/lib/flower"] * 2
    places = {
        each.split(":")[1] for service in SERVICES.values() for each in service["volumes"] if each.startswith("flower:")
    }
    assert places == {"/var/lib/flower"}


def containerfile() -> list[list[str]]:
    """The instructions of the Containerfile, each as its words."""
    text = (HOSTS.parent / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_the_containerfile_names_exact_images_files_that_exist_and_no_root():
    stages: dict[str, list[list[str]]] = {}
    for name, *words in containerfile():
        assert name in {"FROM", "COPY", "RUN", "USER"}, name
        if name == "FROM":
            image, stage = words[0], words[2]
            assert image in stages or re.fullmatch(r"python:\d+\.\d+\.\d+-[\w-]+", image), image
            stages[stage] = [*stages.get(image, [])]
        else:
            stages[stage].append([name, *words])
        if name == "COPY":
            assert all((HOSTS.parents[2] / source).exists() for source in words[:-1]), words
    assert set(stages) == {"packages", "worker", "supernode", "coordinator"}
    users = {stage: [words[1] for words in listed if words[0] == "USER"] for stage, listed in stages.items()}
    assert users == {
        "packages": [],
        "worker": ["10001:10001"],
        "supernode": ["10002:10002"],
        "coordinator": ["10002:10002"],
    }
    assert {SERVICES["worker"]["user"], SERVICES["supernode"]["user"]} == {"10001:10001", "10002:10002"}
