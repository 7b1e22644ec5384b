import json
import math

import pytest
from typer.testing import CliRunner

from panfm.errors import ConfigError
from simulations.__main__ import app
from simulations.harness import QUICKSTART, TRANSIENT, StudyOptions, check_writable, run_jobs
from simulations.study_result import StudyResult
from tests.cases import quick


def halve(number):
    if number < 0:
        raise ValueError(number)
    return {"half": number / 2}


def test_pairs_are_draws_times_seeds_in_one_order():
    assert StudyOptions(seeds=2, draws=2, first_seed=3).pairs() == [(3, 3), (3, 4), (4, 3), (4, 4)]


@pytest.mark.parametrize("workers", quick([1, 2], 1))
def test_results_come_in_the_order_of_the_jobs(workers):
    assert run_jobs(halve, [3, 1, 2], workers=workers) == [{"half": 1.5}, {"half": 0.5}, {"half": 1.0}]


def test_a_study_that_breaks_off_goes_on_where_it_was(tmp_path, monkeypatch):
    path, done = tmp_path / "out.json", []
    monkeypatch.setattr("simulations.harness.commit", lambda: "abc")

    def halve_once(number):
        done.append(number)
        return {"half": math.nan} if number == 0 else halve(number)

    with pytest.raises(ValueError, match="-1"):
        run_jobs(halve_once, [3, 0, -1], workers=1, keep_for=path)
    three, zero = run_jobs(halve_once, [3, 0], workers=1, keep_for=path)
    assert three == {"half": 1.5}
    assert math.isnan(zero["half"])
    assert done == [3, 0, -1]
    StudyResult("toy", {}).write(path)
    assert [left.name for left in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize("now", ["other", "abc-dirty", "unknown"])
def test_what_other_code_has_measured_is_measured_again(tmp_path, monkeypatch, now):
    path = tmp_path / "out.json"
    kept = '{"commit": "%s", "job": "3", "result": {"half": 9.0}}\n'
    (tmp_path / "out.json.jobs").write_text(kept % ("abc" if now == "other" else now))
    monkeypatch.setattr("simulations.harness.commit", lambda: now)
    assert run_jobs(halve, [3], workers=1, keep_for=path) == [{"half": 1.5}]


def test_result_file(tmp_path):
    result = StudyResult("toy", {"seeds": 2}, unit="s")
    result.add("a", {"time": 1.0, "loss": math.nan})
    result.add("a", {"time": 3.0, "loss": 1.0})
    result.add("b", {"time": 4.0})
    result.add("b", {"time": 2.0})
    assert result.gain("time", "b", "a") == [3.0, -1.0]
    result.write(tmp_path / "new" / "out.json")
    table = json.loads((tmp_path / "new" / "out.json").read_text())
    first = {"metric": "time", "arm": "a", "values": [1.0, 3.0], "mean": 2.0, "sd": math.sqrt(2), "n": 2, "unit": "s"}
    assert table["results"][0] == first
    assert table["results"][1]["values"] == [None, 1.0]
    assert (table["name"], table["config"], table["ratios"]) == ("toy", {"seeds": 2}, {})


def test_a_result_path_is_tried_before_the_work(tmp_path):
    check_writable(None)
    check_writable(tmp_path / "new" / "out.json")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "old.json").write_text("old")
    check_writable(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "old"
    for path in (tmp_path, tmp_path / "old.json" / "out.json"):
        with pytest.raises(ConfigError, match=f"--json {path}: cannot be written"):
            check_writable(path)


def test_the_runs_of_demo_and_studies_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert QUICKSTART.is_file()
    assert TRANSIENT.is_file()


@pytest.mark.parametrize(
    "words", [("study", "sgm"), ("study", "sharing"), ("bench", "sgm-overhead"), ("bench", "round-overhead")]
)
def test_every_tool_refuses_a_bad_result_path_at_once(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*words, "--json", str(tmp_path)])
    assert isinstance(done.exception, ConfigError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["sgm", "sharing", "dex", "dex-federated"])
def test_a_budget_that_is_none_names_the_command_and_the_budgets(name):
    done = CliRunner().invoke(app, ["study", name, "--budget", "tiny"])
    assert done.exit_code == 2
    assert f"Usage: python -m simulations study {name} " in done.output
    assert "expected one of short, medium, long" in done.output


@pytest.mark.parametrize(
    ("name", "option"), [("round-overhead", "--cycles"), ("sgm-overhead", "--turns"), ("thousand-sites", "--rounds")]
)
def test_a_bench_of_nothing_is_refused(name, option):
    done = CliRunner().invoke(app, ["bench", name, option, "0"])
    assert done.exit_code == 2
    assert "is not in the range x>=1" in done.output
