"""Scores of a task in tables and sentences: which model a site keeps, by the interval of the paired difference."""

import math

import pytest
from rich.console import Console

from panfm.evaluate.result import GAIN, HOLDOUT, PERSONALISED, ProbeResult, Score, read_result, write_result
from panfm.report.console_tables import benefit_lines, probe_tables, task_rows


def score(arm, group, value, low, high, metric="auc"):
    return Score(arm, group, metric, value, low, high, 1)


def result(*scores):
    return ProbeResult((), {}, {}, {}, task=scores)


SCORES = (
    score("federated", HOLDOUT, 0.8, 0.7, 0.9),
    score("federated", HOLDOUT, 0.75, 0.6, 0.8, "accuracy"),
    score("site:a", HOLDOUT, 0.6, 0.5, 0.7),
)


def test_a_row_per_model_and_place_and_a_column_per_metric(tmp_path):
    metrics, rows = task_rows(result(*SCORES))
    assert metrics == ["auc", "accuracy"]
    assert rows == [
        ("federated", "holdout", ".800 [.700, .900]", ".750 [.600, .800]"),
        ("site:a", "holdout", ".600 [.500, .700]", "-"),
    ]
    write_result(tmp_path / "probe.json", result(*SCORES))
    assert read_result(tmp_path / "probe.json").task == SCORES


def test_the_table_is_shown_first_and_not_for_a_run_without_a_task():
    console = Console(width=100, record=True)
    [table] = probe_tables(result(*SCORES))
    console.print(table)
    assert "Predictions of the task" in console.export_text()
    assert not list(probe_tables(result()))


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (
            0.1,
            0.02,
            0.2,
            "a: the run's model predicts its patients better than its own (AUC +.100 [+.020, +.200]); keep",
        ),
        (-0.1, -0.2, -0.05, "a: its own model predicts its patients better than the run's model (AUC -.100"),
        (0.1, -0.1, 0.2, "a: the run's model and its own model cannot be told apart on its patients"),
        (0.1, 0.0, 0.2, "a: the run's model and its own model cannot be told apart"),
        (math.nan, math.nan, math.nan, "a: its patients outside training are too few"),
    ],
)
def test_a_sentence_says_which_model_a_site_keeps(value, low, high, expected):
    [line] = benefit_lines(result(*SCORES, score(f"federated{GAIN}", "site:a", value, low, high)))
    assert line.startswith(expected)


def test_the_personalised_model_is_named():
    [line] = benefit_lines(result(score(f"{PERSONALISED}{GAIN}", "site:a", 0.1, 0.05, 0.2)))
    assert line.startswith("a: the personalised model predicts its patients better")
