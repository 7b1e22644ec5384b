"""Building a kit: options and clones that are refused, altered files that install.py finds, the archive's bytes."""

import io
import os
import runpy
import subprocess
import tarfile
from pathlib import Path

import pytest

from panfm.config import parse_site
from panfm.errors import ConfigError, RunError
from server.flower_cli import ROOT
from server.kit import KitOptions, _archive, _commit_time, _site_toml, _write_sums, write_kit

INSTALL = ROOT / "configs" / "deployment" / "kit" / "install.py"
CERTIFICATE = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


@pytest.fixture
def ca(tmp_path) -> Path:
    path = tmp_path / "ca.crt"
    path.write_text(CERTIFICATE)
    return path


@pytest.mark.parametrize("name", ["", "North", "../x", "a b", "-a", "a\nb", "x" * 65, "ä", "{hospital}"])
def test_a_name_that_no_site_may_have_is_one_line(name, ca, tmp_path):
    with pytest.raises(ConfigError, match=r"hospital: found .*, expected lower-case letters") as error:
        write_kit(KitOptions(name, "c.example.org", ca=ca), ROOT, tmp_path / "x.tar.gz")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("server", ["", "-x.org", "x..org", "https://x.org", "x.org:443", "a b", "X" * 300, "x.org\n"])
def test_a_server_is_a_dns_name(server, ca, tmp_path):
    with pytest.raises(ConfigError, match="--server: found"):
        write_kit(KitOptions("north", server, ca=ca), ROOT, tmp_path / "x.tar.gz")


def test_a_kit_takes_certificates_only_and_replaces_no_file(ca, tmp_path):
    key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
    for text in ("", "x", key, CERTIFICATE + key, f"{CERTIFICATE}{key}{CERTIFICATE}", "ü"):
        ca.write_text(text)
        with pytest.raises(ConfigError, match="--ca"):
            write_kit(KitOptions("north", "c.example.org", ca=ca), ROOT, tmp_path / "x.tar.gz")
    ca.write_text(CERTIFICATE * 2)
    (tmp_path / "x.tar.gz.README.txt").touch()
    for out, words in {"x.zip": "ends in .tar.gz", "x.tar.gz": "x.tar.gz.README.txt: exists"}.items():
        with pytest.raises(ConfigError, match=words):
            write_kit(KitOptions("north", "c.example.org", ca=ca), ROOT, tmp_path / out)
    with pytest.raises(ConfigError, match=r"--wheels .*: holds no wheel"):
        write_kit(KitOptions("north", "c.example.org", ca=ca, wheels=tmp_path), ROOT, tmp_path / "y.tar.gz")


def test_a_clone_with_changes_makes_no_kit(tmp_path):
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@x", *words], check=True)

    git("init", "--quiet")
    (tmp_path / "panfm").mkdir()
    (tmp_path / "panfm" / "a.py").touch()
    git("add", ".")
    git("commit", "--quiet", "--message", "a")
    assert _commit_time(tmp_path) > 1e9
    (tmp_path / "panfm" / "b.py").touch()
    with pytest.raises(RunError, match=r"panfm/b.py: not committed"):
        _commit_time(tmp_path)
    with pytest.raises(RunError, match="git status"):
        _commit_time(tmp_path / "panfm" / "none")


def test_the_site_description_is_filled_and_holds():
    site = parse_site(_site_toml(KitOptions("north.2", "c.example.org", 8443)))
    assert (site.name, site.coordinator.address, site.coordinator.key) == (
        "north.2",
        "c.example.org:8443",
        "/etc/panfm/north.2",
    )
    assert (site.worker.users, site.worker.group, site.worker.socket) == (
        ("flower",),
        "flower",
        "/run/panfm/worker.sock",
    )


def test_an_archive_has_the_same_bytes_whatever_the_folder_looks_like(tmp_path):
    contents = []
    for place, mode in (("a", 0o600), ("b", 0o755)):
        folder = tmp_path / place / "kit"
        folder.mkdir(parents=True)
        for name in ("z", "y") if place == "a" else ("y", "z"):
            (folder / name).write_text(name)
            (folder / name).chmod(mode)
            os.utime(folder / name, (mode, mode))
        contents.append(_archive(folder, 1_700_000_000))
    assert contents[0] == contents[1]
    with tarfile.open(fileobj=io.BytesIO(contents[0])) as archive:
        assert [(entry.name, entry.uid, entry.mtime, entry.mode) for entry in archive] == [
            ("kit", 0, 1_700_000_000, 0o755),
            ("kit/y", 0, 1_700_000_000, 0o644),
            ("kit/z", 0, 1_700_000_000, 0o644),
        ]


def test_install_finds_every_file_that_is_not_the_kits(tmp_path):
    altered = runpy.run_path(str(INSTALL))["altered"]
    for name in ("same", "changed", "gone", "link"):
        (tmp_path / name).write_text(name)
    _write_sums(tmp_path)
    assert altered(tmp_path) == []
    (tmp_path / "changed").write_text("other")
    (tmp_path / "gone").unlink()
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("same")
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "more.service").touch()
    found = [line.removeprefix(f"{tmp_path}/") for line in altered(tmp_path)]
    assert found == [
        "units: is not of this kit; unpack it in an empty folder",
        "units/more.service: is not of this kit; unpack it in an empty folder",
        "changed: its SHA-256 is not the one in SHA256SUMS",
        "gone: missing",
        "link: missing",
    ]


def test_install_shows_the_fingerprint_that_register_expects(tmp_path):
    from server.hospitals import plain_fingerprint

    key = tmp_path / "k.pub"
    key.write_text("ecdsa-sha2-nistp384 AAAA north\n")
    spoken, as_ssh = runpy.run_path(str(INSTALL))["fingerprint"](key)
    assert plain_fingerprint(spoken) == plain_fingerprint(as_ssh)


def test_install_refuses_what_it_does_not_know(capsys):
    assert runpy.run_path(str(INSTALL))["main"](["--force"]) == 2
    assert "--check" in capsys.readouterr().err
