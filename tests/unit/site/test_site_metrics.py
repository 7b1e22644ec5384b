"""`panfm site metrics` on sites in several states: values, labels, damaged records."""

import re
import stat
import time

import pytest
from typer.testing import CliRunner

from panfm.cli import main
from panfm.config import dump_toml, parse_run
from panfm.errors import DataError, PendingApprovalError
from panfm.sharing.messages import Invitation
from panfm.site import Site
from tests.cases import approve
from tests.unit.site.test_site import RUN

SAMPLE = re.compile(r'(panfm_site_[a-z_]+)\{site="alpha"(?:,([a-z]+)="([a-z-]+)")?\} (-?[0-9.e+]+)')


def metrics_of(folder, *words) -> dict[str | tuple[str, str], float]:
    result = CliRunner().invoke(main, ["site", "metrics", str(folder), *map(str, words)])
    assert result.exit_code == 0, result.output
    return samples(result.output)


def samples(text):
    """Name, or name and label's value, -> value."""
    found = [SAMPLE.fullmatch(line).groups() for line in text.splitlines() if not line.startswith("#")]
    return {(name, label) if label else name: float(value) for name, _, label, value in found}


@pytest.fixture
def folder(tmp_path, write_site):
    return write_site(tmp_path / "alpha", "alpha", ("brain", "heart"))


def test_a_new_site_tells_its_limits_and_nothing_that_it_does_not_know(folder):
    told = metrics_of(folder)
    assert told["panfm_site_worker_at_work"] == 0
    assert told["panfm_site_limit", "rounds"] == 100_000
    assert told["panfm_site_may_leave", "updates"] == 1
    assert ("panfm_site_may_leave", "label-sums") not in told
    assert {told["panfm_site_record_holds", record] for record in ("audit-log", "approvals", "ledger")} == {1}
    assert (told["panfm_site_experiments_approved"], told["panfm_site_approvals_waiting"]) == (0, 0)
    assert told["panfm_site_messages_total"] == 0
    assert told["panfm_site_disk_free_bytes"] > 0
    absent = {"last_contact_timestamp_seconds", "last_error_timestamp_seconds", "certificate_end_timestamp_seconds"}
    assert not {f"panfm_site_{name}" for name in (*absent, "epsilon_spent", "epsilon_limit")} & told.keys()
    assert not (folder / ".panfm" / "state").exists()


def test_what_happened_is_told_with_its_time(folder):
    begin = time.time() - 1
    approve(folder, parse_run(RUN))
    site = Site(folder, needs_approval=True)
    with pytest.raises(PendingApprovalError):
        site.handshake(Invitation(dump_toml(parse_run(RUN.replace("seed = 3", "seed = 4")))))
    site.log_error(DataError("of a patient"))
    told = metrics_of(folder)
    assert (told["panfm_site_experiments_approved"], told["panfm_site_approvals_waiting"]) == (1, 1)
    assert begin <= told["panfm_site_last_error_timestamp_seconds"] <= time.time()


def test_epsilon_that_may_be_spent(folder):
    limits = "\n[limits]\nepsilon = 3.0\ndelta = 1e-3\npublic-subjects = 50\n"
    (folder / "site.toml").write_text(f'name = "alpha"\n{limits}')
    told = metrics_of(folder)
    assert (told["panfm_site_epsilon_spent"], told["panfm_site_epsilon_limit"]) == (0, 3)


def test_records_that_do_not_hold_are_told(folder):
    """The ledger is held to what the audit log says was spent."""
    approve(folder, parse_run(RUN))
    (folder / ".panfm" / "state" / "approvals.anchor").unlink()
    told = metrics_of(folder)
    assert [told["panfm_site_record_holds", record] for record in ("audit-log", "approvals", "ledger")] == [1, 0, 1]
    (folder / ".panfm" / "state" / "departures.anchor").write_text("1" * 64)
    told = metrics_of(folder)
    assert [told["panfm_site_record_holds", record] for record in ("audit-log", "approvals", "ledger")] == [0, 0, 0]
    assert "panfm_site_messages_total" not in told


def test_the_file_is_whole_or_stays(folder, tmp_path):
    out = tmp_path / "panfm.prom"
    assert metrics_of(folder, "--out", out) == {}
    before = out.read_text()
    assert stat.S_IMODE(out.stat().st_mode) == 0o644
    assert "panfm_site_worker_at_work" in samples(before)
    (folder / "site.toml").write_text("nothing")
    result = CliRunner().invoke(main, ["site", "metrics", str(folder), "--out", str(out)])
    assert (result.exit_code, out.read_text()) == (1, before)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [out.name]
