"""What install.py of a kit finds in folders that are there, how it keeps a proxy, and which units it waits for."""

import importlib.util
import os
import subprocess
from types import ModuleType

import pytest

from server.flower_cli import ROOT
from server.kit import _write_sums

NO_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="folders must be able to belong to root")


@pytest.fixture
def install(tmp_path, monkeypatch) -> ModuleType:
    """install.py with all its places in folders of a test, which exist and are whole."""
    spec = importlib.util.spec_from_file_location("install", ROOT / "configs" / "deployment" / "kit" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("KIT", "COPIES", "CONFIG", "DATA", "UNITS"):
        folder = tmp_path / name.lower()
        folder.mkdir(mode=0o755)
        monkeypatch.setattr(module, name, folder)
    for name in ("site", "images"):
        (module.DATA / name).mkdir(mode=0o700)
    monkeypatch.setattr(module, "ENVIRONMENTS", {})
    monkeypatch.setattr(module, "SETTLE_S", 0)
    return module


def kit_with(install, *names: str) -> None:
    for name in names:
        (install.KIT / name).parent.mkdir(exist_ok=True)
        (install.KIT / name).write_text(name)
    _write_sums(install.KIT)


def test_compiled_files_links_folders_and_sockets_are_not_of_a_kit(install):
    kit_with(install, "install.py", "units/a.service")
    assert install.altered(install.KIT) == []
    (install.KIT / "__pycache__").mkdir()
    (install.KIT / "__pycache__" / "install.pyc").touch()
    (install.KIT / "wheels").mkdir()
    (install.KIT / "more").symlink_to("/etc")
    os.mkfifo(install.KIT / "units" / "pipe")
    found = install.altered(install.KIT)
    words = ": is not of this kit; unpack it in an empty folder"
    names = ("__pycache__", "__pycache__/install.pyc", "more", "units/pipe", "wheels")
    assert found == [f"{install.KIT}/{name}{words}" for name in names]


def test_a_folder_of_the_kit_that_is_a_link_is_told(install, tmp_path):
    kit_with(install, "units/a.service")
    (install.KIT / "units").rename(tmp_path / "elsewhere")
    (install.KIT / "units").symlink_to(tmp_path / "elsewhere")
    assert f"{install.KIT}/units: is not of this kit; unpack it in an empty folder" in install.altered(install.KIT)


@NO_ROOT
def test_places_that_root_alone_may_write_are_no_fault(install):
    assert install.place_faults("north") == []


@NO_ROOT
@pytest.mark.parametrize("name", ["site", "images"])
def test_a_link_in_place_of_a_data_folder_is_told(install, tmp_path, name):
    """Its target would be given to account panfm."""
    (install.DATA / name).rename(tmp_path / "elsewhere")
    (install.DATA / name).symlink_to(tmp_path / "elsewhere")
    [fault] = install.place_faults("north")
    assert fault.startswith(f"{install.DATA / name}: is a link, expected a folder of its own")


@NO_ROOT
def test_a_folder_of_another_account_is_told(install):
    os.chown(install.DATA / "images", 4321, -1)
    [fault] = install.place_faults("north")
    assert fault.startswith(f"{install.DATA / 'images'}: belongs to account 4321, expected root or panfm")
    os.chown(install.CONFIG, 4321, -1)
    assert any(line.startswith(f"{install.CONFIG}: others than root") for line in install.place_faults("north"))


@NO_ROOT
def test_a_kit_that_others_may_change_and_a_key_that_they_may_read_are_told(install):
    install.KIT.chmod(0o777)
    (install.CONFIG / "north").touch(mode=0o600)
    (install.CONFIG / "north").chmod(0o644)
    key, kit = install.place_faults("north")
    assert key == f"{install.CONFIG / 'north'}: open to every account; chmod o-rwx {install.CONFIG / 'north'}"
    assert kit.startswith(f"{install.KIT}: another account may write into it")


@NO_ROOT
def test_a_proxy_is_remembered_for_a_run_without_the_variable_and_is_for_root_alone(install, monkeypatch):
    (install.CONFIG / "proxy.env").touch()
    (install.CONFIG / "proxy.env").chmod(0o644)
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@proxy:3128")
    install.set_proxy(install.proxy_setting())
    assert (install.CONFIG / "proxy.env").stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("HTTPS_PROXY", "")
    assert install.proxy_setting() == "http://me:secret@proxy:3128"
    install.set_proxy(install.proxy_setting())
    drop_in = install.UNITS / "panfm-supernode.service.d" / "proxy.conf"
    assert drop_in.read_text() == f"[Service]\nEnvironmentFile={install.CONFIG}/proxy.env\n"
    (install.CONFIG / "proxy.env").unlink()
    install.set_proxy(install.proxy_setting())
    assert not drop_in.exists()


@pytest.mark.parametrize("proxy", ["http://a b:1", 'http://"x":1', "http://x:1\nLD_PRELOAD=/x", "http://a\\b:1"])
def test_a_proxy_that_could_be_another_line_of_the_file_is_a_fault(install, monkeypatch, proxy):
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    found = install.machine_faults({"python": "3.11", "machine": "x", "disk-gib": 0, "gpu": False})
    assert [line.split(":")[0] for line in found].count("HTTPS_PROXY") == 1


@pytest.mark.parametrize(
    ("states", "told"),
    [
        (("active", "active", "activating"), ""),
        (("active", "activating", "active"), "panfm-worker.service: found activating, expected active"),
        (("active", "active", "failed"), "panfm-supernode.service: found failed, expected active"),
        (("", "active", "active"), "panfm-isolation@site.service: found unknown, expected active"),
    ],
)
def test_a_unit_that_does_not_stay_is_told(install, monkeypatch, states, told):
    """A SuperNode is refused, ends and is started again until the coordinator has registered its key."""
    known = dict(zip(install.SERVICES, states, strict=True))

    def answer(words, **_):
        return subprocess.CompletedProcess(words, 0, stdout=f"{known[words[-1]]}\n")

    monkeypatch.setattr(install.subprocess, "run", answer)
    monkeypatch.setattr(install.time, "sleep", lambda seconds: None)
    if not told:
        install.watch_services()
        return
    with pytest.raises(RuntimeError, match=told) as error:
        install.watch_services()
    assert "journalctl -u" in str(error.value)
