import json
import math

import pytest

from panfm.errors import DataError
from panfm.files import json_text, new_folder, read_checked, read_digest, write_atomic, write_checked


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
    with pytest.raises(DataError, match=r"absent: cannot be read \(FileNotFoundError\)"):
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
