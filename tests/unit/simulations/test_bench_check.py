"""Ratios of benches are compared with kept ones: equal ones pass, larger ones fail, missing ones are errors."""

import io
import json
import math

import pytest
from rich.console import Console
from typer.testing import CliRunner

from panfm.errors import ConfigError, RunError
from simulations.__main__ import app, files_of
from simulations.bench_check import KEPT, REDUCED, check, chosen, keep, read_kept

NAME = "local-step"
KEPT_RATIOS = {"over_dense": 0.5, "over_matmul": 1.25}


@pytest.fixture
def kept(tmp_path):
    path = tmp_path / "kept.json"
    write(path, {NAME: {"options": [*REDUCED[NAME].options], "commit": "abc", "ratios": KEPT_RATIOS}})
    return path


def write(path, table):
    path.write_text(json.dumps(table))


def checked(path, *turns):
    """Check one bench that gives these ratios in turn; returns what was printed and the turns that were left."""
    left, shown = [*turns], io.StringIO()
    check([NAME], Console(file=shown, width=200), path=path, measure_fn=lambda *_: left.pop(0))
    return shown.getvalue(), left


def test_equal_ratios_pass_and_are_measured_once(kept):
    shown, left = checked(kept, KEPT_RATIOS, KEPT_RATIOS)
    assert left == [KEPT_RATIOS]
    assert "local-step over_dense: 0.500, kept 0.500" in shown
    assert "TOO LARGE" not in shown


@pytest.mark.parametrize("factor", [0.2, 1.0, 1.199])
def test_faster_and_slightly_slower_pass(kept, factor):
    checked(kept, {**KEPT_RATIOS, "over_matmul": 1.25 * factor})


@pytest.mark.parametrize("factor", [1.21, 3.0, math.nan, math.inf])
def test_a_regression_fails_and_names_the_ratio(kept, factor):
    slower = {**KEPT_RATIOS, "over_matmul": 1.25 * factor}
    with pytest.raises(RunError, match=r"local-step over_matmul .* \(kept 1.250\): expected at most 1.2 times") as told:
        checked(kept, *[slower] * 4)
    assert "over_dense" not in str(told.value)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_ratio_that_is_too_large_is_measured_up_to_four_times(kept, times):
    shown, left = checked(kept, *[{**KEPT_RATIOS, "over_dense": 0.9}] * times, KEPT_RATIOS)
    assert left == []
    assert "TOO LARGE" not in shown


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda table: table.clear(), "holds nothing of bench local-step"),
        (lambda table: table[NAME].update(options=["--turns", "9"]), "was measured with"),
        (lambda table: table[NAME]["ratios"].pop("over_dense"), "has the ratios over_matmul, expected"),
        (lambda table: table[NAME]["ratios"].update(over_all=1.0), "has the ratios .*over_all, expected"),
        (lambda table: table[NAME]["ratios"].update(over_dense=0.0), "over_dense is 0.0, expected a number above 0"),
        (lambda table: table[NAME]["ratios"].update(over_dense=None), "over_dense is None"),
    ],
)
def test_what_is_not_kept_is_told_before_anything_is_measured(kept, change, told):
    table = json.loads(kept.read_text())
    change(table)
    write(kept, table)
    with pytest.raises(ConfigError, match=told):
        checked(kept)


def test_no_kept_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="holds nothing of bench"):
        checked(tmp_path / "none.json")


def test_an_unknown_bench_is_an_error():
    with pytest.raises(ConfigError, match="locla-step: unknown, expected one of aggregate"):
        chosen(["locla-step"])
    assert isinstance(CliRunner().invoke(app, ["bench-check", "none"]).exception, ConfigError)


def test_the_median_of_three_is_kept_and_other_benches_keep_theirs(kept):
    turns = [{"over_dense": value, "over_matmul": 2.0} for value in (0.9, 0.4, 0.6)]
    other = {"options": [], "commit": "x", "ratios": {"mean/norms": 0.1}}
    write(kept, {"parts-bytes": other})
    keep([NAME], Console(file=io.StringIO()), path=kept, measure_fn=lambda *_: turns.pop())
    table = json.loads(kept.read_text())
    assert table[NAME]["ratios"] == {"over_dense": 0.6, "over_matmul": 2.0}
    assert table[NAME]["commit"]
    assert table["parts-bytes"] == other


def test_every_compared_bench_exists_and_has_kept_ratios():
    assert {*REDUCED} <= {*files_of("bench")}
    assert {*json.loads(KEPT.read_text())} == {*REDUCED}
    assert read_kept(KEPT, REDUCED)


@pytest.mark.slow
def test_a_real_bench_at_its_reduced_size(tmp_path, monkeypatch):
    name = "parts-bytes"
    keep([name], Console(file=io.StringIO()), path=tmp_path / "kept.json")
    check([name], Console(file=io.StringIO()), path=tmp_path / "kept.json")
    table = json.loads((tmp_path / "kept.json").read_text())
    table[name]["ratios"]["mean/norms"] /= 1.3
    write(tmp_path / "kept.json", table)
    with pytest.raises(RunError, match="parts-bytes mean/norms"):
        check([name], Console(file=io.StringIO()), path=tmp_path / "kept.json")
