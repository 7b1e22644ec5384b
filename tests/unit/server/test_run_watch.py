import shutil
import subprocess
import time
from collections import namedtuple

import pytest

from panfm.certificates import certificate_end
from panfm.config.patient_dp import PatientDpConfig
from panfm.errors import DataError
from panfm.report.run_events import read_events
from server.events import EventLog
from server.run_folder import RunFolder
from server.run_watch import note_budget, note_certificates, note_disk, watched

Usage = namedtuple("Usage", "total used free")
GIB = 2**30


def told(folder):
    return [(event.kind.value, event.details["level"]) for event in read_events(folder)]


def make_certificate(path, days):
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=x -keyout /dev/null"
    subprocess.run([*command.split(), "-days", str(days), "-out", str(path)], check=True, capture_output=True)


def test_a_disk_is_told_when_it_is_low_and_when_it_has_room_again(tmp_path, monkeypatch):
    log = EventLog(tmp_path)
    for free in (50, 4, 3, 50, 50, 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(100 * GIB, 0, free * GIB))
        note_disk(tmp_path, log)
    assert told(tmp_path) == [("disk", "low"), ("disk", None), ("disk", "low")]


def test_a_certificate_is_told_once_before_it_ends(tmp_path):
    path, log = tmp_path / "server.pem", EventLog(tmp_path)
    for days in (400, 20, 400):
        make_certificate(path, days)
        assert certificate_end(path) == pytest.approx(time.time() + days * 86_400, abs=120)
        for _ in range(2):
            note_certificates([path], log)
    path.unlink()
    note_certificates([path], EventLog(tmp_path))
    assert told(tmp_path) == [("certificate", "ends soon"), ("certificate", None), ("certificate", "not known")]
    path.write_text("no certificate")
    with pytest.raises(DataError, match=r"server\.pem"):
        certificate_end(path)


def test_a_budget_is_told_at_80_percent(tmp_path, make_run):
    private = PatientDpConfig(epsilon=8.0, delta=1e-4, public_subjects=100, noise_multiplier=1.0, sample_rate=0.1)
    run, log = make_run().model_copy(update={"patient_dp": private}), EventLog(tmp_path)
    for spent in (6.3, 6.4, 8.0):
        note_budget(run, {"a": spent, "b": 1.0, "c": None}, log)
    (event,) = read_events(tmp_path)
    assert (event.site, event.words) == ("a", "has spent 6.4 of its planned epsilon 8")


def test_the_page_is_written_at_each_event(tmp_path, make_run):
    folder = RunFolder.create(tmp_path, make_run())
    page = tmp_path / "status.html"
    with watched(tmp_path, folder.events):
        deadline = time.monotonic() + 20
        folder.events.begin("run-1", 0)
        while not page.exists() or "the run begins" not in page.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
