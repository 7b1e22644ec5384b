"""The page of a run and the page that compares runs, from made run folders."""

import html
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from panfm.cli import main
from panfm.config.patient_dp import PatientDpConfig
from panfm.errors import DataError
from panfm.evaluate.result import Score, write_result
from panfm.report.charts import COLOURS
from panfm.report.report_data import Examples, ReportData, read_report_data, write_report_data
from panfm.report.report_page import render, write_comparison
from panfm.report.run_comparison import run_names
from panfm.report.run_files import read_run
from panfm.report.verdict import main_scores, verdict
from tests.unit.report.made_runs import LONG, STREAMS, make_run, png, probe, report_data

SECTIONS = [
    "verdict",
    "labels",
    "few-labels",
    "learning",
    "saliency",
    "monitors",
    "missing-organs",
    "leakage",
    "embedding",
    "examples",
    "sites",
    "exchange",
    "left-out",
    "privacy",
    "cost",
    "run",
]
HOSTILE = [
    "<script>alert(1)</script>",
    '"><svg onload=alert(1)>',
    "</style></title><script>x</script>",
    "{{ 7 * 7 }}{% include 'report.css' %}",
    "\u202ereversed",
]


class Tags(HTMLParser):
    """Tags, attributes and anchors of a page; every tag that is opened is closed."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.ids, self.open = set(), set(), [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def words_of(page):
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def has_nan(page):
    """Whether the text or a drawing of the page contains NaN."""
    return bool(re.search(r"\b(nan|inf)\b", page.replace("update holds NaN", ""), re.IGNORECASE))


def test_a_whole_run_has_all_sections_and_is_small(tmp_path):
    page = render(read_run(make_run(tmp_path / "run", ["alpha", "beta"])))
    assert Tags(page).ids == SECTIONS
    assert len(page.encode()) < 3_000_000
    for anchor in re.findall(r'href="#([^"]*)"', page):
        assert anchor in SECTIONS
    words = words_of(page)
    assert "Training together beat every site alone." in words
    assert (
        "The federated model scores higher than the start model, an untrained model and plain image statistics."
        in words
    )
    assert "beta alone, the best site" in words
    assert "brain-mr (20%)" in words
    assert "1.500 CPU hours, measured" in words
    assert "about 0.03 kWh = 1.500 h x 12 W per busy core x 1.67 / 1000" in words
    assert words.count("AUC is the chance") == 1
    assert not has_nan(page)


@pytest.mark.parametrize("words", HOSTILE)
def test_words_of_sites_and_tables_stay_words(tmp_path, words):
    page = render(read_run(make_run(tmp_path / "run", [words, "beta"], label=words, hostile=words)))
    told = Tags(page)
    assert "script" not in told.tags
    assert not [name for name in told.attributes if name.startswith("on")]
    assert told.ids == SECTIONS
    assert "default-src 'none'" in page
    assert words in html.unescape(page)
    assert page.count("<style>") == page.count("</style>") == 1


def test_twelve_sites_with_long_names(tmp_path):
    page = render(read_run(make_run(tmp_path / "run", LONG)))
    assert Tags(page).ids == SECTIONS
    assert all(site in page for site in LONG)
    assert "1 more" in page  # of thirteen learning curves


def test_one_site_and_one_round(tmp_path):
    page = render(read_run(make_run(tmp_path / "run", ["alpha"], rounds=1)))
    assert Tags(page).ids == SECTIONS


@pytest.mark.parametrize("gone", ["probe.json", "report.json", "rounds.jsonl", "sites.json", "model/metadata.json"])
def test_a_missing_file_leaves_a_page_that_says_so(tmp_path, gone):
    folder = make_run(tmp_path / "run", ["alpha", "beta"])
    (folder / gone).unlink()
    page = render(read_run(folder))
    assert {"verdict", "labels", "learning", "embedding", "sites", "run"} <= {*Tags(page).ids}
    assert "<figure></figure>" not in page
    assert not re.search(r'<div class="figures">\s*</div>', page)
    expected = {
        "probe.json": "this page cannot say how good the model is",
        "report.json": "keeps them in report.json at its end",
        "rounds.jsonl": "No round is done yet.",
        "sites.json": "alpha",
        "model/metadata.json": "6 of 10 rounds, not begun",
    }
    assert expected[gone] in words_of(page) or gone == "model/metadata.json"


def test_scores_that_cannot_be_told(tmp_path):
    folder = make_run(tmp_path / "run", ["alpha", "beta"])
    result = probe(["alpha", "beta"], ["diabetes"])
    nothing = tuple(replace(score, value=math.nan, low=math.nan, high=math.nan) for score in result.scores)
    write_result(folder / "probe.json", replace(result, scores=nothing))
    page = render(read_run(folder))
    assert "The federated model has no score on held-out patients." in page
    assert not has_nan(page)


def test_numbers_alone_are_shown_by_r2(tmp_path):
    folder = make_run(tmp_path / "run", ["alpha"])
    scores = tuple(
        Score(arm, "age", "r2", value, value - 0.1, value + 0.1, 1)
        for arm, value in (("federated", 0.3), ("untrained", -0.2))
    )
    write_result(folder / "probe.json", replace(probe(["alpha"], []), scores=scores, labels=scores))
    told = verdict(read_run(folder))
    assert told.headline == "The federated model scores .300 on held-out patients; no site alone was scored."
    assert "R2 of age, 30 held-out patients" in told.chart
    assert told.explanation.startswith("R2 is the share")


@pytest.mark.parametrize(
    ("site", "headline"),
    [
        (0.60, "Training together beat every site alone."),
        (0.69, "Training together came out ahead of every site alone, by less than these patients can tell."),
        (0.72, "Training together did not beat the best site alone, a; the difference is less than these patients can"),
        (0.80, "Training together did worse than the best site alone, a."),
    ],
)
def test_the_headline_follows_the_interval(tmp_path, site, headline):
    """The federated model has .71 [.67, .75]."""
    folder = make_run(tmp_path / "run", ["a"])
    result = probe(["a"], ["x"])
    scores = tuple(replace(score, value=site) if score.arm == "site:a" else score for score in result.scores)
    write_result(folder / "probe.json", replace(result, scores=scores))
    run = read_run(folder)
    assert verdict(run).headline.startswith(headline)
    assert main_scores(run.probe)[0].arm == "federated"


def test_references_that_are_ahead_are_named(tmp_path):
    folder = make_run(tmp_path / "run", ["a"])
    result = probe(["a"], ["x"])
    better = {"statistics": 0.75, "tokenizer": 0.8}
    scores = tuple(replace(score, value=better.get(score.arm, score.value)) for score in result.scores)
    write_result(folder / "probe.json", replace(result, scores=scores))
    told = verdict(read_run(folder))
    assert told.headline == "Training together beat every site alone; it is not better than plain image statistics."
    assert told.sentences[0] == "The federated model scores higher than the start model and an untrained model."
    assert "without any network, reaches .800" in told.sentences[1]


def test_a_private_run_tells_epsilon_and_what_its_claim_does_not_cover(tmp_path):
    private = PatientDpConfig(epsilon=8.0, delta=1e-4, public_subjects=100, noise_multiplier=1.0, sample_rate=0.1)
    changes = {
        "patient-dp": private.model_dump(by_alias=True),
        "objective": {"standardise": False},
        "masking": {"policy": "random"},
    }
    folder = make_run(tmp_path / "run", ["alpha", "beta"], **changes)
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    told = [line | {"epsilon": {"alpha": 0.5 * line["round"]}} for line in lines]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    words = words_of(render(read_run(folder)))
    assert "Planned for the whole run: epsilon 8 at delta 0.0001." in words
    assert "alpha 3.000 8 6" in words
    assert words.count("the privacy claim does not cover this section") == 2


def test_experts_have_a_map_and_predictions_may_be_absent(tmp_path):
    model = {"model": {"backbone": "director-experts"}}
    folder = make_run(tmp_path / "run", ["alpha", "beta"], **model)
    data = report_data(["alpha", "beta"], "x")
    rows = [replace(row, prediction=None) for row in data.examples.rows]
    write_report_data(folder, replace(data, examples=Examples(rows, 0.6, 0, {})))
    page = render(read_run(folder))
    assert "experts" in Tags(page).ids
    assert "brain-mr, beta" in page
    assert "there is no third picture" in page
    assert page.count("<img") == 2 * len(STREAMS)
    write_report_data(folder, ReportData())
    assert "experts" in Tags(render(read_run(folder))).ids


EXAMPLE = {"stream": "a", "input": '"><script>', "masked": "AA", "prediction": None}
MAP = {"pca": [[0, 0]], "explained": [1, 0], "tsne": [], "sites": ["a"], "organs": ["b"], "labels": {}}


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        ({"examples": {"rows": [EXAMPLE], "hidden": 0.5, "fitted": 0, "error": {}}}, "examples.rows.0.input"),
        ({"embedding": MAP}, "embedding"),
        ({"cost": {"cpu_seconds": "much", "gpu": None}}, "cost.cpu_seconds"),
        ([], ""),
    ],
)
def test_report_data_of_another_shape_is_refused(tmp_path, damage, where):
    (tmp_path / "report.json").write_text(json.dumps(damage))
    with pytest.raises(DataError, match=rf"report\.json: {where}.*not what a simulation writes there"):
        read_report_data(tmp_path)


def test_report_data_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(DataError, match=r"report\.json: not valid JSON"):
        read_report_data(tmp_path)


def test_report_data_comes_back(tmp_path):
    data = report_data(["a", "b"], "x")
    write_report_data(tmp_path, data)
    assert read_report_data(tmp_path).experts.rows[1].site == "b"
    assert read_report_data(tmp_path).examples.rows[0].input == png()


def test_two_runs_are_compared(tmp_path):
    first, second = (
        make_run(tmp_path / "first", ["a", "b"]),
        make_run(tmp_path / "second", ["a", "b"], train={"rounds": 6}),
    )
    shown = CliRunner().invoke(main, ["report", str(first), str(second), "--out", str(tmp_path / "both.html")])
    assert shown.exit_code == 0, shown.output
    page = (tmp_path / "both.html").read_text()
    assert Tags(page).ids == ["verdict", "runs", "labels", "learning", "missing-organs", "descriptions"]
    words = words_of(page)
    assert "first has the highest AUC, .710; its interval holds second" in words
    assert "second train.rounds 6 10" in words
    assert not (first / "report.html").exists()


def test_runs_without_scores_are_compared(tmp_path):
    first, second = make_run(tmp_path / "first", ["a"]), make_run(tmp_path / "second", ["a"])
    for folder in (first, second):
        (folder / "probe.json").unlink()
    page = write_comparison([read_run(first), read_run(second)], tmp_path / "page.html").read_text()
    assert "None of these runs has an AUC of held-out patients." in page
    assert "All runs have the same description." in page


def test_runs_of_equal_folder_names_are_told_apart(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    runs = [read_run(make_run(tmp_path / name / "run", ["a"])) for name in ("one", "two")]
    assert run_names(runs) == ["one/run", "two/run"]
    assert run_names([runs[0], runs[0]]) == ["run (1)", "run (2)"]


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    folder = make_run(tmp_path / "run", ["a"])
    refused = CliRunner().invoke(main, ["report", str(folder), "--out", str(folder / "run.toml" / "page.html")])
    assert refused.exit_code == 1
    assert "run.toml/page.html: cannot be written (NotADirectoryError: Not a directory), expected" in refused.stderr


def test_every_line_has_a_style_that_the_page_knows(tmp_path):
    """More models than colours are scored with organs missing."""
    run = read_run(make_run(tmp_path / "run", LONG))
    grid = {"auc": 0.7, "auc_missing_1": 0.6}
    missing = {score.arm: grid for score in run.probe.scores}
    page = render(replace(run, probe=replace(run.probe, missing=missing)))
    used = {int(number) for number in re.findall(r'class="line[^"]*\bc(\d+)', page)}
    assert used <= set(range(COLOURS))
    assert len(missing) > COLOURS
