"""Geometry of charts: where things stand, not how they look."""

import math
import re

import numpy as np
import pytest

from train.charts import MAX_LINE_POINTS, Scale, line_chart, linear_ticks, log_ticks, merge_bins, value_axis


def points(path):
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path)]


def chart(line, dots=(), **settings):
    return line_chart(line, dots, **({"x_max": 0.0, "show": str} | settings))


def test_a_line_goes_through_its_values():
    drawn = chart([(0, 0.0), (50, 2.0), (100, 4.0)])
    assert points(drawn.lines[0]) == [(0, 100), (50, 50), (100, 0)]


def test_the_axis_ends_at_the_planned_step():
    assert points(chart([(0, 0.0), (50, 4.0)], x_max=200.0).lines[0])[-1] == (25, 0)


def test_dots_stand_on_the_axes_of_the_line():
    drawn = chart([(0, 0.0), (100, 4.0)], [(50, 1.0)])
    assert [(dot.x, dot.y, dot.label) for dot in drawn.dots] == [(50, 75, "validation at step 50: 1.0")]


def test_a_value_that_is_not_finite_leaves_a_gap():
    drawn = chart([(0, 1.0), (25, math.nan), (50, 1.0), (75, math.inf), (100, 1.0)], [(100, math.nan)])
    assert drawn.lines[0].count("M") == 3
    assert len(points(drawn.lines[0])) == 3
    assert drawn.dots == ()


def test_a_logarithmic_axis_only_where_it_is_allowed_and_worth_it():
    wide, narrow = [(0, 1.0), (100, 100.0)], [(0, 1.0), (100, 2.0)]
    assert chart(wide, log_allowed=True).log
    assert not chart(narrow, log_allowed=True).log
    assert not chart(wide).log
    assert not chart([(0, 0.0), (100, 100.0)], log_allowed=True).log
    middle = chart([(0, 1.0), (50, 10.0), (100, 100.0)], log_allowed=True)
    assert points(middle.lines[0])[1] == (50, 50)


def test_many_points_are_averaged():
    steps = np.arange(10_000)
    drawn = chart([(int(s), float(s)) for s in steps])
    assert drawn.averaged == 25
    xy = np.array(points(drawn.lines[0]))
    assert len(xy) == MAX_LINE_POINTS
    np.testing.assert_allclose(100 - xy[:, 1], xy[:, 0] * 9999 / 10_000, atol=0.02)


@pytest.mark.parametrize("values", [[], [0.0], [5.0], [-3.0, 2.0], [1e-9], [1e12], [0.1, 0.3]])
def test_every_value_lies_on_its_axis(values):
    scale, ticks = value_axis(values)
    assert all(0 <= scale(value) <= 100 for value in (*values, *ticks))
    assert 1 <= len(ticks) <= 6


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 1000), (3, 97), (-0.5, 53.5), (0, 1e-4)])
def test_linear_ticks_are_round_and_inside(low, high):
    ticks = linear_ticks(low, high, 4)
    assert 3 <= len(ticks) <= 7
    assert low <= min(ticks) and max(ticks) <= high
    step = ticks[1] - ticks[0]
    assert float(f"{step:.0e}") == pytest.approx(step)
    assert f"{step:.0e}"[0] in "125"


@pytest.mark.parametrize(("low", "high"), [(0.07, 0.9), (1e-8, 3.0), (0.9, 1.1), (2e-4, 0.4)])
def test_logarithmic_ticks_are_inside_and_few(low, high):
    ticks = log_ticks(low, high)
    assert 1 <= len(ticks) <= 7
    assert low <= min(ticks) and max(ticks) <= high


def test_a_scale_is_monotone():
    scale = Scale(0.01, 10.0, log=True)
    positions = [scale(value) for value in (0.01, 0.1, 1.0, 10.0)]
    assert positions == pytest.approx([0, 100 / 3, 200 / 3, 100])


def test_merged_bins_keep_their_ends_and_their_sum():
    edges, counts = merge_bins(range(101), [1] * 100, limit=30)
    assert edges[0] == 0 and edges[-1] == 100
    assert len(counts) == len(edges) - 1 == 25
    assert sum(counts) == 100
