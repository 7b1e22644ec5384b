import json
import math
import stat

import pytest

from panfm.errors import DataError
from panfm.files import (
    RoundFiles,
    is_locked,
    locked,
    open_atomic,
    read_checked,
    read_digest,
    write_atomic,
    write_checked,
)
from panfm.outputs import append_json_line, json_text, new_folder, read_json_lines


def test_atomic_write_replaces_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "new" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_checked_round_trip(tmp_path):
    digest = write_checked(tmp_path / "file", b"content")
    assert read_checked(tmp_path / "file") == b"content"
    assert read_digest(tmp_path / "file") == digest
    assert read_digest(tmp_path / "absent") == ""


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"x" + b[1:], lambda b: b[:-1] + b"!", lambda b: b""])
def test_damage_is_noticed_and_named(tmp_path, damage):
    path = tmp_path / "round-000001.state"
    write_checked(path, b"content")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"round-000001\.state: corrupted"):
        read_checked(path)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent: cannot be read \(FileNotFoundError: No such file or directory\)"):
        read_checked(tmp_path / "absent")


def test_json_has_null_for_what_is_not_finite():
    content = {"a": [1, 0.5, math.nan], "b": (math.inf, {"c": -math.inf}), "d": None, "e": True}
    assert json.loads(json_text(content)) == {"a": [1, 0.5, None], "b": [None, {"c": None}], "d": None, "e": True}


def test_a_new_folder_is_whole_or_absent(tmp_path):
    def make(stop: bool):
        with new_folder(tmp_path / "new") as folder:
            (folder / "file").write_text("content")
            assert not (tmp_path / "new").exists()
            if stop:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(stop=True)
    assert not (tmp_path / "new").exists()
    make(stop=False)
    assert (tmp_path / "new" / "file").read_text() == "content"
    with pytest.raises(DataError, match="new: exists already"):
        make(stop=False)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_two_makers_of_one_folder_do_not_meet(tmp_path):
    with new_folder(tmp_path / "new") as slow:
        (slow / "file").write_text("slow")
        with new_folder(tmp_path / "new") as quick:
            (quick / "file").write_text("quick")
        assert (slow / "file").read_text() == "slow"
    assert (tmp_path / "new" / "file").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_new_folder_inside_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"c: cannot be made \(.*Not a directory"), new_folder(tmp_path / "file" / "c"):
        pass


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_an_atomic_file_has_its_rights_from_the_start(tmp_path, mode):
    with open_atomic(tmp_path / "file", mode=mode) as file:
        [part] = tmp_path.iterdir()
        assert (part.suffix, stat.S_IMODE(part.stat().st_mode)) == (".part", mode)
        file.write(b"content")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with open_atomic(tmp_path / "file") as slow:
        slow.write(b"slow")
        write_atomic(tmp_path / "file", b"quick")
        assert (tmp_path / "file").read_bytes() == b"quick"
    assert (tmp_path / "file").read_bytes() == b"slow"


def test_json_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_json_lines(path) == []
    for number in (1, math.nan):
        append_json_line(path, {"number": number})
    assert path.read_bytes() == b'{"number": 1}\n{"number": null}\n'
    path.write_bytes(path.read_bytes() + b'{"number": 3}')  # still being written
    assert read_json_lines(path) == [{"number": 1}, {"number": None}]


@pytest.mark.parametrize("line", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_json_line_that_does_not_hold_is_named(tmp_path, line):
    (tmp_path / "lines.jsonl").write_bytes(b"1\n" + line + b"\n2\n")
    with pytest.raises(DataError, match=r"lines\.jsonl:2: found .*, expected one JSON object per line"):
        read_json_lines(tmp_path / "lines.jsonl")
    (tmp_path / "lines.jsonl").unlink()
    (tmp_path / "lines.jsonl").mkdir()
    with pytest.raises(DataError, match=r"lines\.jsonl: cannot be read \(IsADirectoryError: Is a directory\)"):
        read_json_lines(tmp_path / "lines.jsonl")


def test_the_last_three_rounds_are_kept(tmp_path):
    files = RoundFiles(tmp_path / "new")
    assert files.rounds() == []
    for number in range(1, 6):
        digest = files.write(number, str(number).encode())
    assert files.rounds() == [3, 4, 5]
    assert (files.path(5).name, read_checked(files.path(5))) == ("round-000005.state", b"5")
    assert read_digest(files.path(5)) == digest
    files.write(4, b"again")  # a server that went back: round 5 has another past
    assert files.rounds() == [3, 4]


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "lock"
    assert not is_locked(path)
    with locked(path, wait_s=0.0):
        assert is_locked(path)
        with pytest.raises(BlockingIOError), locked(path, wait_s=0.0):
            pass
    assert not is_locked(path)
