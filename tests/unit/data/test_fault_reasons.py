"""Kind 11: an error of the file system without its reason."""

import errno
import os

import pytest
from typer.testing import CliRunner

from panfm.cli import main
from panfm.config import load_run
from panfm.data.cache import open_store
from panfm.data.labels import read_label_table
from panfm.data.readers import ImageError, file_fingerprint, find_reader, read_bytes
from panfm.errors import ConfigError, DataError, PanfmError, reason
from panfm.evaluate.embed import read_features
from panfm.files import read_checked, write_atomic
from panfm.installed_plug_ins import installed_plug_ins
from panfm.outputs import read_json_lines
from server.expected_sites import ExpectedSites
from tests.unit.data.conftest import STREAM

CODES = {
    errno.EACCES: "Permission denied",
    errno.ELOOP: "Too many levels of symbolic links",
    errno.EISDIR: "Is a directory",
    errno.ENOSPC: "No space left on device",
    errno.EIO: "Input/output error",
    errno.EMFILE: "Too many open files",
    errno.ENAMETOOLONG: "File name too long",
    errno.ESTALE: "Stale file handle",
    errno.EROFS: "Read-only file system",
}
READERS = {
    "an image": read_bytes,
    "an image of unknown kind": find_reader,
    "the fingerprint of an image": file_fingerprint,
    "a label table": read_label_table,
    "expected sites": ExpectedSites.read,
    "features": read_features,
    "a run description": load_run,
    "private state": read_checked,
    "lines of JSON": read_json_lines,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("code", CODES)
def test_whatever_is_read_the_reason_and_the_path_are_told(tmp_path, monkeypatch, name, code):
    path = tmp_path / "file.csv"
    path.write_text("x")

    def fail(self, *_, **__):
        raise OSError(code, os.strerror(code), str(self))

    installed_plug_ins("image reader")  # asked once in a process, of other files than the one that fails
    for call in ("open", "read_bytes", "read_text", "stat", "exists"):
        if call != "stat" or "fingerprint" in name or "kind" in name:
            monkeypatch.setattr(type(path), call, fail if call != "exists" else lambda _: True)
    with pytest.raises(PanfmError) as caught:
        READERS[name](path)
    assert CODES[code] in str(caught.value)
    assert isinstance(caught.value, ImageError) or "file.csv" in str(caught.value)


def test_circles_folders_and_long_names(site, tmp_path):
    site.write()
    (site.folder / "circle").symlink_to("circle")
    (site.folder / "folder.nii").mkdir()
    long = f"{'x' * 300}.nii"
    for subject, path in (("a", "circle"), ("b", "folder.nii"), ("c", long), ("d", "circle/scan.nii")):
        site.row(subject, path=path)
    assert [line.rpartition(": found ")[2].partition(", expected")[0] for line in site.faults()] == [
        "a path that cannot be read (OSError: Too many levels of symbolic links)",
        "a folder or device",
        "a path that cannot be read (OSError: File name too long)",
        "a path that cannot be read (OSError: Too many levels of symbolic links)",
    ]
    with pytest.raises(ConfigError, match=r"IsADirectoryError: Is a directory"):
        load_run(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_told_with_the_folder(site, monkeypatch, code):
    site.add("a")

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match=rf"cache: cannot hold the cache \({os.strerror(code)}\)"):
        open_store(site.folder, {"brain-mr": STREAM})
    (site.folder / "b.nii").write_text("")
    site.row("b", path="b.nii")
    result = site.check("--quarantine")
    assert result.exit_code == 1
    assert f"quarantine.csv: cannot be written (OSError: {os.strerror(code)})" in result.stderr


@pytest.mark.parametrize("code", CODES)
def test_any_command_ends_in_one_line(site, monkeypatch, code):
    site.add("a")

    def fail(*_, **__):
        raise OSError(code, os.strerror(code), "/data/scan.nii")

    monkeypatch.setattr("panfm.data.check.load_site", fail)
    result = CliRunner().invoke(main, ["site", "check", str(site.folder)])
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [f"/data/scan.nii: {reason(OSError(code, os.strerror(code)))}"]


def test_a_write_that_fails_names_its_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device: .*report\.html"):
        write_atomic(tmp_path / "report.html", b"x")
    assert list(tmp_path.iterdir()) == []


def test_reasons():
    assert reason(PermissionError(13, "Permission denied")) == "PermissionError: Permission denied"
    assert reason(OSError("image file is truncated")) == "OSError: image file is truncated"
    assert reason(KeyError()) == "KeyError"
    assert reason(ValueError("two\nlines")) == "ValueError: two lines"
