import re
import stat
import threading
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import pytest
from typer.testing import CliRunner

from panfm.cli.site_metrics import METRICS as SITE_METRICS
from panfm.errors import ConfigError, RunError
from panfm.report.prometheus import escaped
from panfm.report.run_files import read_run
from server.coordinator import app
from server.events import EventLog
from server.metrics import METRICS, metrics_text
from server.metrics_page import MetricsServer
from tests.unit.report.made_runs import make_run as made

PAGE = Path(__file__).parents[3] / "docs" / "monitoring.md"
SAMPLE = re.compile(r'(panfm_[a-z_]+)\{(?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+\} (-?[0-9.e+]+)')


def test_metrics_of_a_run(tmp_path):
    folder = made(tmp_path / "run", ["alpha", 'be"t\\a\n'], rounds=3)
    EventLog(folder).begin("made-1", 0)
    text = metrics_text(read_run(folder))
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(SAMPLE.fullmatch(line) for line in samples)
    assert 'panfm_run_rounds_done{run="made"} 3' in samples
    assert 'panfm_run_events_total{run="made",kind="started"} 1' in samples
    assert 'panfm_run_events_total{run="made",kind="failed"} 0' in samples
    assert 'panfm_run_site_answered_rounds{run="made",site="be\\"t\\\\a\\n"} 3' in samples
    assert len(re.findall("^# TYPE ", text, re.MULTILINE)) == len({line.partition("{")[0] for line in samples})


def test_the_command_writes_a_whole_file(tmp_path):
    folder, out = made(tmp_path / "run", ["alpha"], rounds=1), tmp_path / "panfm.prom"
    result = CliRunner().invoke(app, ["metrics", str(folder), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert 'panfm_run_rounds_done{run="made"} 1\n' in out.read_text()
    assert stat.S_IMODE(out.stat().st_mode) == 0o644


@pytest.fixture
def served(tmp_path):
    """A run folder with one round, and the address where its metrics are served."""
    folder = made(tmp_path / "run", ["alpha"], rounds=1)
    with MetricsServer(folder, "127.0.0.1:0") as server:
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_metrics_are_served_as_the_run_is_now(served):
    folder, address = served
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert 'panfm_run_finished{run="made"} 1\n' in (first := answer.read().decode())
    EventLog(folder).begin("made-1", 0)
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
        assert (text := answer.read().decode()) != first
    assert 'panfm_run_events_total{run="made",kind="started"} 1\n' in text


@pytest.mark.parametrize("path", ["/", "/metrics/../run.toml", "/run.toml", "/metrics?x=1"])
def test_nothing_but_metrics_is_served(served, path):
    with pytest.raises(HTTPError) as caught:
        urllib.request.urlopen(f"{served[1]}{path}", timeout=10)
    assert caught.value.code == 404
    caught.value.close()


def test_a_run_that_cannot_be_read_is_an_error_without_details(served, caplog):
    folder, address = served
    (folder / "rounds.jsonl").write_text("secret\n{}\n")
    with pytest.raises(HTTPError) as caught:
        urllib.request.urlopen(f"{address}/metrics", timeout=10)
    assert caught.value.code == 500
    assert str(folder) not in caught.value.read().decode()
    assert "rounds.jsonl" in caplog.text


@pytest.mark.parametrize("listen", ["", "9109", ":9109", "host:", "host:x", "host:65536", "::1:80", "[host]:80", "h:²"])
def test_an_address_that_is_none_is_told(tmp_path, listen):
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        MetricsServer(tmp_path, listen)


def test_an_address_that_is_taken_is_told(served):
    with pytest.raises(RunError, match="nobody can listen there"):
        MetricsServer(served[0], served[1].removeprefix("http://"))


@pytest.mark.parametrize(("text", "expected"), [("a\\b", "a\\\\b"), ('"', '\\"'), ("\n", "\\n"), ("\udcff", "?")])
def test_labels_are_escaped(text, expected):
    assert escaped(text) == expected


def test_the_page_names_every_metric():
    rows = re.findall(r"^\| `(panfm_\w+)` \| (\w+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert {name: (kind, meaning) for name, kind, meaning in rows} == METRICS | SITE_METRICS
