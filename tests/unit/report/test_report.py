import json
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from panfm.config import RunConfig, StreamConfig, dump_toml
from panfm.errors import ConfigError, DataError
from panfm.evaluate.result import ProbeResult, Score, write_result
from panfm.report.console_tables import number_text, print_tables, summary
from panfm.report.report_page import write_report
from panfm.report.run_files import read_run

STREAM = StreamConfig(shape=(4, 4, 4), patch=(2, 2, 2), spacing_mm=(1.0, 1.0, 1.0))
RUN = RunConfig(name="toy", streams={"brain-mr": STREAM, "liver-mr": STREAM})
PROBE = ProbeResult(
    scores=(
        Score("federated", "all", "auc", 0.7124, 0.68, 0.74, 27),
        Score("untrained", "all", "auc", 0.61, 0.58, 0.65, 27),
        Score("federated", "size", "r2", -0.05, math.nan, math.nan, 1),
    ),
    missing={"federated": {"auc": 0.71, "auc_missing_1": 0.65, "auc_drop_brain": 0.04, "auc_no_dominant": math.nan}},
    balance={},
    subjects={"fit": 90, "test": 30},
    notes=("federated: <never>: not probed",),
    streams={"federated": {"brain-mr": 0.8, "liver-mr": math.nan}},
)


def line(number, *sites):
    return {
        "round": number,
        "phase": "train",
        "sites": {
            site: {"loss": 1.0 / number, "validation_loss": None, "saliency": {"brain-mr": 1.2}} for site in sites
        },
        "rejected": {},
        "bytes_up": {"backbone": 10, "stream:brain-mr": 4},
        "bytes_down": {"backbone": 10},
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run.toml").write_text(dump_toml(RUN))
    return tmp_path


@pytest.fixture
def finished(folder):
    lines = [line(1, "b-site", "a-site"), line(2, "a-site")]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    held = {"a-site": {"subjects": 5, "streams": {"brain-mr": 5}}, "<b>": {"subjects": 7, "streams": {"liver-mr": 7}}}
    (folder / "sites.json").write_text(json.dumps({"sites": held}))
    (folder / "model").mkdir()
    (folder / "model" / "metadata.json").write_text(json.dumps({"run-id": "toy-1234", "rounds": 2}))
    write_result(folder / "probe.json", PROBE)
    return folder


def text_of(run):
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        print_tables(run, console)
        return console.export_text()


def test_a_finished_run_is_read(finished):
    run = read_run(finished)
    assert run.is_finished
    assert run.site_names == ("<b>", "a-site", "b-site")
    assert run.series("a-site", "loss") == ([1, 2], [1.0, 0.5])
    assert run.series("a-site", "validation_loss") == ([], [])
    assert run.bytes_by_group("up") == {"backbone": 20, "stream:brain-mr": 8}


def test_tables_show_sites_scores_and_notes(finished):
    text = text_of(read_run(finished))
    assert re.search(r"a-site +│ brain +│ +5 │ 1.000 -> 0.500", text)
    assert ".712 [.680, .740]" in text
    assert re.search(r"federated +│ +-.050", text)
    assert "<never>: not probed" in text
    assert re.search(r"brain-mr +│ +.800", text)
    assert re.search(r"liver-mr +│ +- +│", text)


WITH_SITES = replace(
    PROBE,
    scores=(
        *PROBE.scores,
        Score("statistics", "all", "auc", 0.65, 0.6, 0.7, 27),
        Score("site:north", "all", "auc", 0.72, 0.6, 0.8, 27),
        Score("site:south", "all", "auc", math.nan, math.nan, math.nan, 0),
    ),
    few_labels={
        "federated": {"auc_100": 0.6},
        "untrained": {"auc_100": 0.55},
        "statistics": {"auc_100": 0.52},
        "site:north": {"auc_100": 0.59},
        "site:south": {"auc_100": math.nan},
    },
)


def test_sentences_say_what_the_federation_gained_and_whether_the_interval_holds_others():
    assert summary(WITH_SITES) == [
        "With all labels, probes of the federated model reach an AUC of .712 on held-out patients: +.062 "
        "against plain statistics, the better reference, and -.008 against the best site alone, north.",
        "Its 95 % interval, .680 to .740, holds site:north: these patients are too few to tell them apart.",
        "With labels of 100 patients, probes of the federated model reach an AUC of .600 on held-out patients: "
        "+.050 against the untrained model, the better reference, and +.010 against the best site alone, north.",
    ]


def test_nothing_is_said_of_a_gain_that_was_not_measured():
    assert summary(PROBE) == []  # no site alone


def test_few_labels_and_sentences_are_in_tables_and_report(finished):
    write_result(finished / "probe.json", WITH_SITES)
    text, page = text_of(read_run(finished)), write_report(read_run(finished)).read_text()
    assert re.search(r"site:north +│ +.590", text)
    assert "100 labelled" in page
    for sentence in summary(WITH_SITES):
        assert sentence.split(": ")[1] in " ".join(text.split())
        assert sentence in page


def test_a_run_that_has_just_begun_is_reported(folder):
    run = read_run(folder)
    assert not run.is_finished
    assert "toy: sites" in text_of(run)
    page = write_report(run).read_text()
    assert "0 of 10 rounds, in progress" in page
    assert "0 of 10 rounds are done, and the run is not begun." in page
    assert "this page cannot say how good the model is" in page
    assert "<svg" not in page  # nothing to draw
    assert len(page) < 40_000


def test_a_line_being_written_is_left_out_but_a_damaged_one_is_named(finished):
    path = finished / "rounds.jsonl"
    path.write_text(path.read_text() + '{"round": 3, "si')
    assert len(read_run(finished).rounds) == 2
    path.write_text('{"round"\n' + json.dumps(line(2)) + "\n")
    with pytest.raises(DataError, match=r"rounds.jsonl:1: found"):
        read_run(finished)


@pytest.mark.parametrize(
    "damage",
    [b"\xff\xfe\n", b"3\n", b'{"round": 3, "sites": {"a-site": {"loss": "low"}}}\n', b'{"round": 3, "sites": [1]}\n'],
)
def test_a_line_that_is_whole_but_no_round_is_named(finished, damage):
    path = finished / "rounds.jsonl"
    path.write_bytes(path.read_bytes() + damage)
    with pytest.raises(DataError, match=r"rounds.jsonl:3: found .* expected one JSON object per line"):
        read_run(finished)


def test_rounds_that_are_a_folder_are_one_line(folder):
    (folder / "rounds.jsonl").mkdir()
    with pytest.raises(DataError, match=r"rounds.jsonl: cannot be read \(IsADirectoryError: Is a directory\)"):
        read_run(folder)


def test_the_page_is_self_contained_and_escaped(finished):
    page = write_report(read_run(finished)).read_text()
    assert page.startswith("<!doctype html>")
    assert not re.search(r"""<(script|img|iframe)[^>]*\ssrc\s*=|<link[^>]*href|@import|url\(['"]?http""", page)
    assert "<script" not in page
    assert page.count('role="img"') >= 3
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "federated: &lt;never&gt;: not probed" in page
    assert ".712 [.680, .740]" in page
    assert '<th scope="row">brain-mr</th><td class="n">.800</td></tr>' in page
    assert '<th scope="row">liver-mr</th><td class="n">-</td></tr>' in page
    assert len(page) < 3_000_000


def test_sections_without_data_say_so(finished):
    page = write_report(read_run(finished)).read_text()
    assert "Stream by stream" in page
    assert page.count("Needs patients&#39; images") == 2
    (finished / "probe.json").unlink()
    page = write_report(read_run(finished)).read_text()
    assert "Stream by stream" not in page
    assert "has no scores of held-out patients" in page
    assert "Learning curves" in page


def test_a_folder_that_is_no_run_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"run.toml: no such file"):
        read_run(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_file_is_named(folder, content):
    (folder / "sites.json").write_text(content)
    with pytest.raises(DataError, match=r"sites.json: "):
        read_run(folder)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, ".500"), (-0.25, "-.250"), (1.0, "1.000"), (-1.5, "-1.500"), (math.nan, "-"), (0.0, ".000")],
)
def test_numbers_are_short(value, text):
    assert number_text(value) == text


def test_every_label_has_its_own_row(finished):
    """With the subjects for whom it is known; a label table that does not match the images is told."""
    scores = (
        Score("federated", "sex", "auc", 0.81, 0.7, 0.9, 1),
        Score("untrained", "sex", "auc", 0.6, 0.5, 0.7, 1),
        Score("federated", "<age>", "r2", 0.25, 0.1, 0.3, 1),
    )
    known = {"sex": {"fit": 90, "test": 30}, "<age>": {"fit": 88, "test": 29}}
    unmatched = {"a-site": {"without_row": 2, "without_images": 1}, "b-site": {"without_row": 0, "without_images": 0}}
    write_result(finished / "probe.json", replace(PROBE, labels=scores, known=known, unmatched=unmatched))
    run, console = read_run(finished), Console(record=True, width=80)
    print_tables(run, console)
    rows = [line.replace("\u2502", " ").split() for line in console.export_text().splitlines()]
    assert ["sex", "AUC", "90", "30", ".810", "[.700,", ".900]", ".600"] in rows
    assert ["<age>", "R2", "88", "29", ".250", "[.100,", ".300]", "-"] in rows
    told = "a-site: 2 subjects with images and no row in the label table, 1 row without an image of the run"
    page = write_report(run).read_text()
    cells = [".250 [.100, .300]", "-", "R2", "88", "29"]
    row = "".join(f"<td>{cell}</td>" if cell == "R2" else f'<td class="n">{cell}</td>' for cell in cells)
    assert f'<tr><th scope="row">&lt;age&gt;</th>{row}</tr>' in page
    assert told in page
    assert "b-site: 0" not in page
