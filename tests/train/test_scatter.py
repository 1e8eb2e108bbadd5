"""Geometry of labelled points: where they stand, which are on the front, that labels cover nothing."""

import re

import numpy as np
import pytest

from train.scatter import Point, pareto_front, scatter


def drawn(*points):
    return scatter([Point(x, y, f"form {i}", i) for i, (x, y) in enumerate(points)], lambda p: p.label)


def test_positions_are_logarithmic_in_x_and_linear_in_y():
    chart = drawn((10, 0.1), (100, 0.2), (1000, 0.3))
    x, y = ([getattr(marker, name) for marker in chart.markers] for name in "xy")
    assert x[1] - x[0] == pytest.approx(x[2] - x[1])
    assert y[0] - y[1] == pytest.approx(y[1] - y[2])
    assert y[0] > y[2] and not chart.log


def test_errors_over_a_wide_range_are_logarithmic():
    chart = drawn((10, 0.001), (20, 0.01), (30, 0.1))
    y = [marker.y for marker in chart.markers]
    assert chart.log and y[0] - y[1] == pytest.approx(y[1] - y[2])


@pytest.mark.parametrize("points", [[(26, 0.07)], [(26, 0.0)], [(25, 0.07), (27, 0.07)], [(1, 1e-6), (40_000, 2.0)]])
def test_everything_lies_on_the_axes_and_has_ticks(points):
    chart = drawn(*points)
    places = [*chart.x_ticks, *chart.y_ticks]
    assert all(-1e-9 <= at <= 100 + 1e-9 for at in [tick.at for tick in places])
    assert all(0 <= marker.x <= 100 and 0 <= marker.y <= 100 for marker in chart.markers)
    assert len(chart.x_ticks) >= 2 and len(chart.y_ticks) >= 2
    assert len({tick.label for tick in chart.x_ticks}) == len(chart.x_ticks)


def test_the_front_equals_its_definition():
    rng = np.random.default_rng(0)
    points = [Point(float(x), float(y), str(i), 0) for i, (x, y) in enumerate(rng.integers(1, 12, (60, 2)))]
    beats = lambda a, b: a.x <= b.x and a.y <= b.y and (a.x, a.y) != (b.x, b.y)
    expected = {(p.x, p.y) for p in points if not any(beats(other, p) for other in points)}
    front = pareto_front(points)
    assert {(p.x, p.y) for p in front} == expected and len(front) == len(expected)


def test_the_line_of_the_front_steps_through_its_points():
    chart = drawn((10, 0.3), (100, 0.2), (50, 0.4), (1000, 0.1))
    a, b, c = chart.markers[0], chart.markers[1], chart.markers[3]
    numbers = [float(n) for n in re.findall(r"[\d.]+", chart.front)]
    assert numbers == pytest.approx([a.x, a.y, b.x, b.y, c.x, c.y], abs=0.01)
    assert drawn((10, 0.3)).front == ""


def test_labels_of_close_points_do_not_cover_each_other():
    chart = drawn(*((26 + i / 10, 0.074 + i / 2000) for i in range(8)))
    places = [(label.left, label.x, label.y) for label in chart.labels]
    assert len(set(places)) == 8
    for i, (left, x, y) in enumerate(places):
        for other_left, other_x, other_y in places[:i]:
            apart = abs(y - other_y) >= 4.5 or (left != other_left and (x < other_x) == left)
            assert apart


def test_seeds_are_drawn_where_there_are_several():
    alone = Point(10, 0.1, "alone", 0, seeds=((10, 0.1),))
    two = Point(20, 0.2, "two", 1, seeds=((19, 0.19), (21, 0.21)))
    chart = scatter([alone, two], lambda p: p.label)
    assert [dot.label for dot in chart.seeds] == ["two", "two"]
    assert np.mean([dot.y for dot in chart.seeds]) == pytest.approx(chart.markers[1].y)
