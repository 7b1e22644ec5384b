import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from panfm.report.run_files import read_run
from server.coordinator import app
from server.events import EventLog
from server.metrics import METRICS, escaped, metrics_text
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


@pytest.mark.parametrize(("text", "expected"), [("a\\b", "a\\\\b"), ('"', '\\"'), ("\n", "\\n"), ("\udcff", "?")])
def test_labels_are_escaped(text, expected):
    assert escaped(text) == expected


def test_the_page_names_every_metric():
    rows = re.findall(r"^\| `(panfm_\w+)` \| (\w+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert {name: (kind, meaning) for name, kind, meaning in rows} == METRICS
