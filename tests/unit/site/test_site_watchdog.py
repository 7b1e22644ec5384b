"""`panfm site watchdog`: a SuperNode that may hold a reply is started anew, once."""

import stat
from datetime import UTC, datetime

import pytest
from typer.testing import CliRunner

from panfm.cli import main
from panfm.cli.site_watchdog import reply_that_waits, started_at, watch_once
from panfm.errors import RunError
from panfm.site import Site
from tests.unit.site.test_site import task

START = 1_800_000_000.0


def lines(*seconds, run="run-1", kind="answer"):
    """Lines of an audit log: rounds that were answered so long after the start."""
    return [
        {"run": run, "round": number, "kind": kind, "time": datetime.fromtimestamp(START + at, UTC).isoformat()}
        for number, at in enumerate(seconds, start=1)
    ]


@pytest.fixture
def systemctl(tmp_path, monkeypatch):
    """A stand-in: tells a state and a time of start, and notes what it was asked."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def place(started: float, state: str = "active", restart: int = 0) -> None:
        script = tmp_path / "systemctl"
        script.write_text(
            f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
            f'if [ "$1" = restart ]; then echo no >&2; exit {restart}; fi\n'
            f"echo ActiveState={state}\necho ActiveEnterTimestamp=@{started:.0f}\n"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    place.asked = tmp_path / "asked"
    return place


@pytest.mark.parametrize(
    ("seconds", "now", "is_overdue"),
    [
        ((0,), 599, False),
        ((0,), 601, True),
        ((0, 100, 200), 200 + 600 + 299, False),  # the pace of 100 s counts three times
        ((0, 100, 200), 200 + 600 + 301, True),
        ((0, 1000, 1010), 1010 + 600 + 1500, False),  # the median of 1,000 and 10 s is 505 s
    ],
)
def test_a_reply_waits_when_the_next_question_is_overdue(seconds, now, is_overdue):
    found = reply_that_waits(lines(*seconds), {"run-1"}, START + now, 600.0)
    assert (found is not None) == is_overdue
    if found:
        assert (found[0]["round"], found[1]) == (len(seconds), START + seconds[-1])


@pytest.mark.parametrize(
    "log",
    [[], lines(0, run="finished"), lines(0, kind="error"), [*lines(0), *lines(1, run=None)]],
    ids=["nothing left", "a run that is over", "an error was the answer", "a handshake came since"],
)
def test_nothing_waits(log):
    assert reply_that_waits(log, {"run-1"}, START + 1e6, 600.0) is None


def test_the_supernode_is_started_anew_once(systemctl):
    systemctl(started=START - 1000)
    told = watch_once(lines(0), {"run-1"}, "node.service", 600.0, now=START + 1000)
    assert told.startswith("round 1 of run-1 was answered at ")
    assert told.endswith(": node.service was started anew")
    assert systemctl.asked.read_text().splitlines()[-1] == "restart node.service"
    systemctl.asked.unlink()
    systemctl(started=START + 1000)
    told = watch_once(lines(0), {"run-1"}, "node.service", 600.0, now=START + 5000)
    assert "it is left alone" in told
    assert "restart" not in systemctl.asked.read_text()
    systemctl.asked.unlink()
    assert watch_once(lines(0), {"run-1"}, "node.service", 600.0, now=START + 10) == "no reply waits"
    assert not systemctl.asked.exists()


def test_what_systemd_cannot_do_is_an_error(systemctl):
    with pytest.raises(RunError, match="systemctl: not found"):
        started_at("node.service")
    systemctl(started=START, state="failed")
    with pytest.raises(RunError, match=r"node.service: failed, expected a unit of systemd that is active"):
        watch_once(lines(0), {"run-1"}, "node.service", 600.0, now=START + 1000)
    systemctl(started=START - 1000, restart=1)
    with pytest.raises(RunError, match=r"node.service: not started anew \(no\)"):
        watch_once(lines(0), {"run-1"}, "node.service", 600.0, now=START + 1000)


def test_the_command_reads_a_sites_own_records(tmp_path, write_site):
    """A round was trained a moment ago: nothing waits."""
    folder = write_site(tmp_path / "alpha", "alpha", ("brain", "heart"))
    Site(folder).train_round(task())
    result = CliRunner().invoke(main, ["site", "watchdog", str(folder)])
    assert (result.exit_code, result.output.strip()) == (0, "no reply waits")
