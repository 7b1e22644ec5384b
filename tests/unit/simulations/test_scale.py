"""Fitted exponents, and what the bench of growing costs writes; figure and tables that are made from it."""

import json
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from simulations.__main__ import app
from simulations.bench.scale import GROWING, exponent, organs_run
from simulations.documents.scale_figure import scale_figure


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_its_exponent(slope):
    assert exponent({size: 3.0 * size**slope for size in (1.0, 2.0, 7.0, 30.0)}) == pytest.approx(slope, abs=1e-9)


def test_two_points_are_enough():
    assert exponent({2.0: 1.0, 8.0: 4.0}) == pytest.approx(1.0)


def test_a_run_has_as_many_organs_as_asked():
    assert len(organs_run("nano", 4, 1, organs=3).streams) == 3


def test_what_is_unknown_is_refused():
    done = CliRunner().invoke(app, ["bench", "scale", "--axes", "sites,moons"])
    assert done.exit_code == 2
    assert "moons: expected some of sites, subjects" in done.output


@pytest.mark.slow
def test_the_bench_at_a_small_size(tmp_path):
    path = tmp_path / "scale.json"
    words = ["bench", "scale", "--turns", "1", "--axes", "subjects", "--no-projection", "--json", str(path)]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    table = json.loads(path.read_text())
    assert [row["arm"] for row in table["results"]] == ["32", "64", "128", "256"]
    assert {*table["ratios"]} == {"subjects", "subjects_at_end"}
    assert 0.3 < table["ratios"]["subjects"] < 1.7


def test_the_figure_shows_each_line_with_its_exponent():
    rows = [
        {"of": name, "metric": "seconds", "arm": arm, "values": [cost, cost]}
        for name in GROWING
        for arm, cost in (("10", 0.1), ("20000", 0.2), ("3000000", 0.2))
    ]
    text = scale_figure({"results": rows, "ratios": dict.fromkeys(GROWING, 0.77), "commit": "a<b"})
    root = ElementTree.fromstring(text)
    shown = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert sum("exponent 0.77" in line for line in shown) == len(GROWING)
    assert {"10", "20k", "3M", "0.1 s"} <= {*shown}
