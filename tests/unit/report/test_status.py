"""Where a run stands, on the page and on the screen, with words of sites that want to be more than words."""

import json
import re

import pytest
from rich.console import Console

from panfm.config import RunConfig, StreamConfig, dump_toml
from panfm.config.patient_dp import PatientDpConfig
from panfm.errors import DataError
from panfm.files import locked
from panfm.report.html_parts import chart
from panfm.report.run_files import read_run
from panfm.report.status import clock, gate_line, headline, left_out, ranges, site_statuses, stream_statuses
from panfm.report.status_page import _SCRIPT, render_status, write_status
from server.console import screen
from server.tracking import scalars

STREAM = StreamConfig(shape=(4, 4, 4), patch=(2, 2, 2), spacing_mm=(1.0, 1.0, 1.0))
RUN = RunConfig(name="toy", streams={"brain-mr": STREAM, "liver-mr": STREAM})
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "'; DROP TABLE sites; --",
    "[red]markup[/red] [link=http://x]y[/link]",
    "\x1b[2J\x1b]0;title\x07 escape",
    "line\nbreak\r\nand\ttab",
    "\u202ereversed",
    "</title></style><script>x</script>",
]


def line(number, **changes):
    whole = {
        "round": number,
        "asked": ["a", "b"],
        "seconds": 60.0,
        "loss": 1.0 / number,
        "sites": {"a": {"seconds": 50.0, "loss": 1.0 / number, "validation_loss": None, "saliency": {}}},
        "late": [],
        "rejected": {"b": "update holds NaN"},
        "away": {"c": "offline"},
        "coverage": {"brain-mr": ["a"]},
        "profile": {"brain-mr": 1.25},
        "epsilon": {},
        "bytes_up": {"backbone": 2_000_000},
        "bytes_down": {"backbone": 4_000_000},
    }
    return whole | changes


def write(folder, *lines, run=RUN, sites=None):
    (folder / "run.toml").write_text(dump_toml(run))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    held = {"a": {"subjects": 5, "streams": {"brain-mr": 5}}, "b": {"subjects": 7, "streams": {"liver-mr": 7}}}
    (folder / "sites.json").write_text(json.dumps({"sites": sites or held, "failed": ["node 9: panfm 0.0"]}))
    return read_run(folder)


def on_screen(run):
    console = Console(width=300, force_terminal=False)
    with console.capture() as capture:
        console.print(screen(run))
    return capture.get()


def test_sites_and_streams(tmp_path):
    run = write(tmp_path, line(1, rejected={}), line(2))
    a, b, c = site_statuses(run)
    assert (a.asked, a.answered, a.seconds, a.loss, a.now) == (2, 2, 50.0, 0.5, "answered")
    assert (b.asked, b.answered, b.loss, b.now) == (2, 0, None, "left out: update holds NaN")
    assert (c.site, c.subjects, c.asked, c.now) == ("c", None, 0, "offline")
    brain, liver = stream_statuses(run)
    assert (brain.holders, brain.trained_by, brain.last_round, brain.saliency) == (("a",), ("a",), 2, 1.25)
    assert (liver.holders, liver.trained_by, liver.last_round, liver.saliency) == (("b",), (), None, None)


def test_who_was_left_out_is_told_once_per_reason(tmp_path):
    run = write(tmp_path, *(line(number, rejected={} if number == 3 else {"b": "NaN"}) for number in (1, 2, 3, 4)))
    times = [("b", "rounds 1-2, 4", "NaN"), ("c", "rounds 1-4", "offline"), ("", "the start", "node 9: panfm 0.0")]
    assert left_out(run) == times
    assert len(left_out(run, most=1)) == 2


def test_headline_follows_the_run(tmp_path):
    assert headline(write(tmp_path)) == "0 of 10 rounds, not begun"
    with locked(tmp_path / ".lock", wait_s=0.0):
        run = write(tmp_path, line(1), line(2, seconds=120.0), line(3, seconds=120.0))
        assert headline(run) == "3 of 10 rounds, running; 2 min 0 s a round, about 14 min 0 s left"
    (tmp_path / "checkpoint").mkdir()
    assert headline(read_run(tmp_path)) == "3 of 10 rounds, interrupted"
    (tmp_path / "ended.json").write_text('{"state": "stopped", "reason": "by hand"}')
    assert headline(read_run(tmp_path)) == "3 of 10 rounds, stopped: by hand"
    (tmp_path / "ended.json").write_text('{"state": "failed", "reason": "lost quorum"}')
    assert headline(read_run(tmp_path)) == "3 of 10 rounds, failed: lost quorum"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "metadata.json").write_text('{"rounds": 3}')
    assert headline(read_run(tmp_path)) == "3 of 10 rounds, finished"


def test_the_page_loads_itself_again_only_while_the_run_goes_on(tmp_path):
    with locked(tmp_path / ".lock", wait_s=0.0):
        assert 'http-equiv="refresh"' in render_status(write(tmp_path, line(1)))
    page = write_status(tmp_path).read_text()
    assert 'http-equiv="refresh"' not in page
    assert '<progress max="10" value="1">' in page
    assert "<td>left out: update holds NaN</td>" in page
    assert "2.0 MB" in page
    assert len(page) < 20_000


def test_a_page_of_a_running_server_says_when_the_next_is_due(tmp_path):
    with locked(tmp_path / ".lock", wait_s=0.0):
        page = render_status(write(tmp_path, line(1)))
    assert re.search(r"as of .{10,}; a new page is due by ", page)
    assert "Last heard of at" in page
    assert "is due by" not in render_status(read_run(tmp_path))


def test_the_last_events_are_told(tmp_path):
    run = write(tmp_path, line(1))
    assert "History" not in render_status(run)
    events = [
        {"time": "2026-01-01T00:00:00+00:00", "run": "r", "round": number, "kind": "left-out", "site": "b"}
        for number in range(1, 41)
    ]
    (tmp_path / "events.jsonl").write_text(
        "".join(json.dumps(event | {"words": f"late {event['round']}"}) + "\n" for event in events)
    )
    run = read_run(tmp_path)
    page = render_status(run)
    assert page.index("late 40") < page.index("late 39")
    assert "late 10<" not in page
    assert "left-out b late 40" in on_screen(run)


def test_planned_epsilon_is_shown_and_called_a_plan(tmp_path):
    private = PatientDpConfig(epsilon=8.0, delta=1e-4, public_subjects=100, noise_multiplier=1.0, sample_rate=0.1)
    changes = {"objective": {"standardise": False}, "masking": {"policy": "random"}}
    run = RunConfig(name="toy", streams={"brain-mr": STREAM}, patient_dp=private, **changes)
    found = write(tmp_path, line(1, epsilon={"a": 0.5, "b": 0.5}), line(2, epsilon={"a": 0.75, "b": 0.5}), run=run)
    assert [each.epsilon for each in site_statuses(found)] == [0.75, 0.5, None]
    assert "0.750" in on_screen(found)
    for told in (on_screen(found), render_status(found)):
        assert "(8, 0.0001)-DP per patient" in told
        assert "is the plan" in told
    assert "Planned epsilon" in render_status(found)


@pytest.mark.parametrize("words", HOSTILE)
def test_words_of_sites_stay_words(tmp_path, words):
    """In names of sites and nodes, reasons, streams and groups."""
    hostile = line(
        1,
        sites={words: {"seconds": 1.0, "loss": 0.5}},
        rejected={words: words, "b": words},
        away={f"node {words}": words},
        coverage={words: [words]},
        bytes_up={words: 3},
        epsilon={words: 1.0},
    )
    event = {"time": "2026-01-01T00:00:00+00:00", "run": words, "round": 1, "kind": "left-out", "site": words}
    (tmp_path / "events.jsonl").write_text(json.dumps(event | {"words": words, "details": {words: words}}) + "\n")
    sites = {words: {"subjects": 1, "streams": {words: 1, "brain-mr": 1}}}
    run = write(tmp_path, hostile, line(2), hostile | {"round": 3}, sites=sites)
    (tmp_path / "ended.json").write_text(json.dumps({"state": words, "reason": words}))
    page = render_status(read_run(tmp_path))
    assert page.count("<script") == page.count("setInterval")
    page = page.replace(f"<script>{_SCRIPT}</script>", "")
    tags = {tag.split()[0] for tag in re.findall(r"<(/?[a-z][^>]*)>", page.lower())}
    plain = "html head meta title style body h1 h2 p progress table tr th td svg path text polyline circle span"
    assert {tag.lstrip("/") for tag in tags} <= set(plain.split())
    assert not re.search(r"<[^>]*\son[a-z]+\s*=", page)
    assert page.count("<style>") == page.count("</style>") == 1
    assert "default-src 'none'" in page
    shown = on_screen(run)
    assert all(each.isprintable() or each == "\n" for each in shown)
    if words.startswith("["):
        assert words in shown


def test_a_damaged_sites_file_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "sites.json").write_text('{"sites": {"a": {"streams": ["brain-mr"]}}}')
    with pytest.raises(DataError, match=r"sites\.json: sites\.a\.streams: not what a run writes there"):
        read_run(tmp_path)


def test_a_legend_names_the_lines_that_are_drawn():
    drawn = chart({"a": [(1, 2.0), (2, 1.0)], "<b>": [(1, 3.0)], "c": []}, y="loss")
    assert drawn.count('class="line c') == 4  # two lines and their marks
    assert drawn.count('class="line dot') == 1  # a single point
    assert "&lt;b&gt;" in drawn
    assert ">c<" not in drawn
    assert chart({"a": [], "b": [(1, float("inf"))]}, y="loss") == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (99.4, "99 s"), (100.0, "1 min 40 s"), (7260.0, "2 h 1 min")],
)
def test_lengths_of_time(seconds, text):
    assert clock(seconds) == text


def test_ranges_of_rounds():
    assert [ranges([1]), ranges([1, 2, 3]), ranges([1, 3, 4])] == ["round 1", "rounds 1-3", "rounds 1, 3-4"]


def test_the_gate_tells_which_rounds_were_kept(tmp_path):
    gates = [(0.8, 0.9, True), (0.85, 0.8, False), (None, 0.8, False)]
    lines = [
        line(number, gate={"measure": measure, "before": before, "kept": kept, "missing": {}, "seconds": 1.0})
        for number, (measure, before, kept) in enumerate(gates, start=1)
    ]
    run = write(tmp_path, *lines)
    expected = "gate: round 1 kept of 3; measure 0.9000 at the start, 0.8000 now"
    assert gate_line(run) == expected
    assert expected in render_status(run)
    assert dict(scalars(lines[0]))["gate/measure"] == 0.8
    assert "gate/measure" not in dict(scalars(lines[2]))
    assert gate_line(write(tmp_path, line(1))) == ""
    assert "no round kept" in gate_line(write(tmp_path, *lines[1:]))
