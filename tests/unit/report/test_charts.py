"""Charts as SVG and HTML text: positions, ticks, and values that are not finite."""

import math
import re

import pytest

from panfm.report.charts import HEIGHT, WIDTH, Bar, Line, _axis, _nice, interval_bars, line_chart, mark_style, scatter


def chart(*lines):
    return line_chart([Line(points, "c0") for points in lines], x="round", y="loss", words="<words>")


def test_lines_stay_inside_and_keep_their_last_point():
    drawn = chart([(number, float(number % 7)) for number in range(1, 2001)])
    [points] = re.findall(r'points="([^"]*)"', drawn)
    pairs = [tuple(map(float, pair.split(","))) for pair in points.split()]
    assert len(pairs) <= 150
    assert all(50 <= x <= WIDTH - 12 and 10 <= y <= HEIGHT - 34 for x, y in pairs)
    assert pairs[-1][0] == WIDTH - 12
    assert 'aria-label="&lt;words&gt;"' in drawn


def test_what_is_not_finite_is_not_drawn():
    assert chart([], [(1, math.nan), (2, math.inf)]) is None
    assert "nan" not in chart([(1, math.nan), (2, 0.5)])


def test_one_point_is_a_dot_and_a_level_line_is_drawn():
    assert "dot" in chart([(3, 2.0)])
    assert chart([(1, 2.0), (2, 2.0)]).count("<polyline") == 1


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.0]),
        (0.52, 0.71, [0.5, 0.55, 0.6, 0.65, 0.7, 0.75]),
        (-3.0, 17.0, [-5.0, 0.0, 5.0, 10.0, 15.0, 20.0]),
        (2.0, 2.0, [1.8, 1.9, 2.0, 2.1, 2.2]),
        (0.0, 0.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_axes_go_from_a_round_number_to_a_round_number(low, high, ticks):
    first, last, found = _axis(low, high, most=5)
    assert found == pytest.approx(ticks)
    assert (first, last) == pytest.approx((ticks[0], ticks[-1]))


def test_steps_are_one_two_or_five_times_a_power_of_ten():
    assert [_nice(step) for step in (0.03, 0.2, 1.0, 3.0, 7.0)] == pytest.approx([0.05, 0.2, 1.0, 5.0, 10.0])


def test_bars_begin_at_chance_and_carry_their_interval():
    bars = [Bar("ours", 0.7, 0.6, 0.8, "ours"), Bar("<b>", 0.4), Bar("none", math.nan)]
    drawn = interval_bars(bars, start=0.5, axis="AUC", text={"ours": ".7", "<b>": ".4", "none": "-"})
    assert 'class="bar" style="left:25.00%;width:50.00%"' in drawn  # from .4 to .8
    assert 'class="whisker" style="left:50.00%;width:50.00%"' in drawn
    assert 'class="bar" style="left:0.00%;width:25.00%"' in drawn
    assert drawn.count('class="bar"') == 2
    assert "&lt;b&gt;" in drawn


def test_points_are_drawn_by_class_within_the_frame():
    drawn = scatter([(0.0, 0.0), (1.0, 2.0), (0.5, 1.0)], [0, 9, -1], x="first", y="second", words="points")
    assert [mark_style(0), mark_style(9)] == ["dots c0", "dots c1 square"]
    assert drawn.count("<path") == 4  # frame, unknown, two classes
    places = [tuple(map(float, place)) for place in re.findall(r"M([\d.]+) ([\d.]+)h0", drawn)]
    assert len(places) == 3
    assert all(18 <= x <= 300 and 0 <= y <= 282 for x, y in places)
    assert "nan" not in scatter([(1.0, 1.0), (1.0, 1.0)], [0, 0], x="", y="", words="")
