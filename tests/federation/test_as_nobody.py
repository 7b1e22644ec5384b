"""Other local accounts of the coordinator's and a site's machine, under the shipped units, read and reach nothing.

One machine holds both; a run is under way, its ServerApp and a ClientApp are alive.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.federation.conftest import RUN
from tests.federation.shipped_machine import NAMESPACES, ROOT

PROGRAMS = ("nft", "ip", "nginx", "setpriv", "unshare")
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")]


def has_namespaces() -> bool:
    """Whether this account may make namespaces and load rules in them, with the accounts' owner match."""
    if os.geteuid() or MISSING:
        return False
    rule = "add table inet t; add chain inet t c; add rule inet t c meta skuid 1 counter"
    return not subprocess.run([*NAMESPACES, "nft", rule], capture_output=True, check=False).returncode


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (apt-get install nftables iproute2)"
    ),
    pytest.mark.skipif(not has_namespaces(), reason="needs root, network namespaces and nftables"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory, write_site):
    """Run the trial; return, by account, what it could read and reach."""
    folder = tmp_path_factory.mktemp("nobody")
    extra = '[worker]\nsocket = "/run/panfm/worker.sock"\nusers = ["flower"]\ngroup = "flower"\n'
    extra += '[coordinator]\naddress = "coordinator.example.org:443"\nroot-certificates = "/etc/panfm-site/ca.crt"\n'
    extra += 'key = "/etc/panfm-site/example-hospital"\n'
    write_site(folder / "site", "example-hospital", ("brain",), extra=extra)
    text = "\n".join(line for line in RUN.splitlines() if not line.startswith(("heart-mr", "liver-mr")))
    text = text.replace("rounds = 3", "rounds = 50") + "\n[federation]\nmin-sites = 1\n"
    (folder / "run.toml").write_text(text, encoding="utf-8")
    words = [folder / "site", folder / "run.toml", folder / "findings.json"]
    command = [*NAMESPACES, sys.executable, "-m", "tests.federation.isolation_trial", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return json.loads((folder / "findings.json").read_text(encoding="utf-8"))


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin", "PYTHONPATH": str(ROOT)}


def test_the_deployment_is_what_is_tried(found):
    """Ports, files and processes of every part, so that nothing below is empty for want of a deployment."""
    known = found["known"]
    assert {443, 8000, 9094} <= set(known["ports"])
    names = {Path(path).name for path in known["files"]}
    assert {"server.key", "ca.key", "superexec.secret", "superlink.db", "example-hospital"} <= names
    assert {"manifest.csv", "example-hospital-0-brain.nii.gz", "worker.sock", "rounds.jsonl"} <= names
    assert any(name.endswith(".state") for name in names)
    assert len(known["processes"]) >= 7
    assert any("flwr-serverapp" in line for line in found["tokens"])
    assert any("flwr-clientapp" in line for line in found["tokens"])


def test_nobody_reaches_no_route_but_what_nginx_publishes_and_refuses(found):
    ports = found["nobody"]["ports"]
    assert list(ports) == ["443"]
    assert ports["443"].pop("/v1/fleet/pull-messages") == 401
    assert set(ports["443"].values()) == {404}


def test_nobody_reads_no_file_no_process_and_no_socket(found):
    folders = {"/srv/panfm", "/run/panfm"}  # without secrets in themselves
    assert set(found["nobody"]["files"]) <= folders
    assert found["nobody"]["processes"] == []
    assert found["nobody"]["sockets"] == []


def test_each_account_reaches_its_own_part_and_no_other(found):
    """The controls: the same attempts succeed for the account whose part it is."""
    assert found["coordinator"]["ports"]["8000"]["/v1/control/list-runs"] == 200
    assert "9094" not in found["coordinator"]["ports"]
    assert "9094" in found["flower"]["ports"]
    assert "8000" not in found["flower"]["ports"]
    assert set(found["panfm"]["ports"]) == {"443"}
    files = {name: set(found[name]["files"]) for name in ("coordinator", "flower", "panfm")}
    assert {"/etc/panfm/server.key", "/var/lib/panfm-coordinator/superlink.db"} <= files["coordinator"]
    assert {"/etc/panfm-site/example-hospital"} <= files["flower"]
    assert {"/srv/panfm/site/manifest.csv"} <= files["panfm"]
    shared = {"/srv/panfm", "/run/panfm"}
    for one, other in (("coordinator", "flower"), ("coordinator", "panfm"), ("flower", "panfm")):
        assert files[one] & files[other] <= shared
    assert found["coordinator"]["processes"]


@pytest.mark.parametrize("role", ["coordinator", "site"])
def test_the_doctor_finds_the_isolation_in_force(found, role):
    status, lines = found["doctors"][role]
    assert [line for line in lines if not line.startswith("ok ")] == []
    assert status == 0


@pytest.mark.parametrize(
    ("role", "faults"),
    [
        ("coordinator", {"rules for port 8000", "port 8000", "/proc", "secret /etc/panfm/server.key"}),
        ("site", {"rules for port 9094", "port 9094", "/proc", "key /etc/panfm-site/example-hospital", "images of"}),
    ],
)
def test_the_doctor_names_each_protection_that_is_gone(found, role, faults):
    status, lines = found["doctors without"][role]
    named = [line.removeprefix("FAULT    ") for line in lines if line.startswith("FAULT ")]
    assert status == 1
    assert [fault for fault in faults if not any(line.startswith(fault) for line in named)] == []


def test_without_the_protections_nobody_reads_everything(found):
    open_to_all = found["without"]
    assert open_to_all["ports"]["8000"]["/v1/control/list-runs"] == 200
    assert "9094" in open_to_all["ports"]
    assert "/etc/panfm/server.key" in open_to_all["files"]
    assert "/srv/panfm/site/manifest.csv" in open_to_all["files"]
    assert any(name.endswith("cmdline") for name in open_to_all["processes"])
    assert "/run/panfm/worker.sock" in open_to_all["sockets"]
