"""credentials.sh is killed before each program that it starts, given again, and leaves one whole set of credentials."""

import shutil
import subprocess
from pathlib import Path

import pytest

from server.flower_cli import ROOT

SCRIPT = ROOT / "configs" / "deployment" / "credentials.sh"
SETS = {
    "coordinator": {"ca.key", "ca.crt", "server.key", "server.pem", "superexec.secret"},
    "site": {"north", "north.pub"},
}
PROGRAMS = ("mkdir", "flock", "rm", "openssl", "ssh-keygen", "sync", "mv")
SHIM = """#!/bin/bash
read -r left <"{counter}"
echo $((left - 1)) >"{counter}"
if [ "$left" = 0 ]; then kill -9 $PPID; exit 137; fi
exec "{program}" "$@"
"""


@pytest.fixture
def deadly(tmp_path) -> Path:
    """A folder of programs that count down in `counter`, and at 0 kill who started them."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in PROGRAMS:
        (folder / name).write_text(SHIM.format(counter=tmp_path / "counter", program=shutil.which(name)))
        (folder / name).chmod(0o755)
    return folder


def give(role: str, folder: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{path}:/usr/bin:/bin"}
    words = [SCRIPT, role, folder, "north"]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def check_whole(role: str, folder: Path) -> None:
    """The set is there, nothing beside it, and its keys and certificates belong together."""
    assert {path.name for path in folder.iterdir()} == SETS[role]
    assert {path.stat().st_mode & 0o077 for path in folder.iterdir() if path.suffix != ".pub"} == {0}
    if role == "coordinator":
        verify = ["openssl", "verify", "-CAfile", folder / "ca.crt", folder / "server.pem"]
        subprocess.run(verify, check=True, capture_output=True)
        keys = [["x509", "-in", folder / "server.pem", "-noout", "-pubkey"]]
        keys += [["pkey", "-in", folder / "server.key", "-pubout"]]
    else:
        keys = []
        made = subprocess.run(["ssh-keygen", "-y", "-f", folder / "north"], capture_output=True, text=True, check=True)
        assert made.stdout.split()[:2] == (folder / "north.pub").read_text().split()[:2]
    assert len({subprocess.run(["openssl", *words], capture_output=True, check=True).stdout for words in keys}) < 2


@pytest.mark.slow
@pytest.mark.parametrize("role", SETS)
def test_after_a_kill_at_any_step_it_goes_on(role, deadly, tmp_path):
    for step in range(50):
        folder = tmp_path / f"folder-{step}"
        (tmp_path / "counter").write_text(f"{step}\n")
        killed = give(role, folder, str(deadly)).returncode != 0
        made = {path.name: path.read_bytes() for path in folder.glob("[a-z]*")}
        is_done = made.keys() == SETS[role] and not list(folder.glob(".*"))
        again = give(role, folder)
        if is_done:
            assert "is there already" in again.stderr
        else:
            assert again.returncode == 0, (step, again.stderr)
        check_whole(role, folder)
        assert {name: (folder / name).read_bytes() for name in made} == made, step
        if not killed:
            break
    assert step >= 10  # programs that were killed, one after the other


@pytest.mark.parametrize(("role", "gone"), [("coordinator", "ca.key"), ("coordinator", "ca.crt"), ("site", "north")])
def test_what_is_there_is_never_replaced_even_if_a_part_was_moved_away(role, gone, tmp_path):
    assert give(role, tmp_path / "x").returncode == 0
    (tmp_path / "x" / gone).unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    again = give(role, tmp_path / "x")
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert "is there already, expected none of" in again.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before


def test_names_and_roles_that_are_none_make_nothing(tmp_path):
    for words in (["site", "../x"], ["site", ""], ["hospital", "north"], ["coordinator", "a b"]):
        done = subprocess.run([SCRIPT, words[0], tmp_path / "x", words[1]], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert not (tmp_path / "x").exists()
