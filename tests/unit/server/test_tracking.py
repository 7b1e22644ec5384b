"""TensorBoard events and the page in the run folder."""

import struct

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event

from panfm.errors import RunError
from server.checkpoint import ServerState
from server.run_folder import RunFolder
from server.tracking import Tracking, scalars
from tests.unit.report.test_status import line


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def events(folder):
    """All events of the one file, read as the TFRecord format says, checksums included."""
    [path] = (folder / "tensorboard").iterdir()
    content, found = path.read_bytes(), []
    while content:
        length = struct.unpack("<Q", content[:8])[0]
        assert struct.unpack("<I", content[8:12])[0] == masked(content[:8])
        data, rest = content[12 : 12 + length], content[12 + length :]
        assert struct.unpack("<I", rest[:4])[0] == masked(data)
        found.append(Event.FromString(data))
        content = rest[4:]
    return found


def told(folder):
    """(tag, step) -> value."""
    points = [(value.tag, event.step, value.simple_value) for event in events(folder) for value in event.summary.value]
    found = {(tag, step): value for tag, step, value in points}
    assert len(found) == len(points)
    return found


@pytest.fixture
def folder(tmp_path, make_run):
    return RunFolder.create(tmp_path / "run", make_run())


def do(tracking, folder, number):
    folder.append_round(line(number))
    tracking.round(line(number))


def test_every_number_of_a_round(folder):
    with Tracking(folder) as tracking:
        do(tracking, folder, 1)
    assert told(folder.path) == {(name, 1): pytest.approx(value) for name, value in scalars(line(1))}
    found = dict(scalars(line(2)))
    assert found["loss/federation"] == found["loss/a"] == 0.5
    assert (found["round/left-out"], found["coverage/brain-mr"], found["saliency/brain-mr"]) == (2.0, 1.0, 1.25)
    assert found["bytes/up"] == 2e6
    assert "validation-loss/a" not in found


def test_a_resumed_run_has_every_step_once(folder):
    with Tracking(folder) as tracking:
        for number in (1, 2, 3):
            do(tracking, folder, number)
    folder.save_state(ServerState("run-1", 2, {}))
    back = RunFolder.resume(folder.path)
    with Tracking(back) as tracking:
        assert {step for _, step in told(folder.path)} == {1, 2}
        do(tracking, back, 3)
    assert {step for _, step in told(folder.path)} == {1, 2, 3}
    first, restart, *_ = events(folder.path)
    assert first.file_version == "brain.Event:2"
    assert restart.session_log.status == 1  # START: what was read before step 0 on is forgotten


def test_what_a_round_does_not_tell_is_left_out():
    silent = line(1, loss=None, profile=None, epsilon={"a": None}, sites={})
    assert not [name for name, _ in scalars(silent) if name.startswith(("loss", "saliency", "epsilon"))]


def test_a_disk_that_does_not_take_it_does_not_stop_a_run(folder, caplog):
    (folder.path / "tensorboard").write_text("in the way")
    (folder.path / "status.html").mkdir()
    with Tracking(folder) as tracking:
        do(tracking, folder, 1)
    assert "tensorboard: cannot be written" in caplog.text
    assert "status.html: cannot be written" in caplog.text


def test_the_page_is_there_from_the_start(folder):
    with Tracking(folder):
        assert "0 of 2 rounds" in (folder.path / "status.html").read_text()


def test_one_process_at_a_time(folder, monkeypatch):
    monkeypatch.setattr("server.run_folder._LOCK_WAIT_S", 0.0)
    with folder.at_work():
        for refused in (
            lambda: RunFolder.resume(folder.path),
            lambda: RunFolder.create(folder.path, folder.run),
            lambda: folder.at_work().__enter__(),
        ):
            with pytest.raises(RunError, match="another process is at work in this run folder"):
                refused()
    RunFolder.resume(folder.path)


def test_why_a_run_failed_is_written_down_until_it_goes_on(folder):
    with pytest.raises(RunError), folder.at_work():
        raise RunError("round 1: no quorum")
    assert '"round 1: no quorum"' in (folder.path / "ended.json").read_text()
    with pytest.raises(ZeroDivisionError), folder.at_work():
        1 / 0  # noqa: B018
    assert "internal error (ZeroDivisionError)" in (folder.path / "ended.json").read_text()
    with folder.at_work():
        assert not (folder.path / "ended.json").exists()
