"""Charts as geometry in percent of their plot area; the template draws them as SVG with labels in HTML.

A chart has no size of its own: the SVG is stretched to the page while line widths and text keep theirs, so
the same chart is readable on a phone and on a desktop, and it takes its colours from the page.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from .report_text import axis_labels

MAX_LINE_POINTS = 400
MAX_BARS = 72


@dataclasses.dataclass(frozen=True)
class Tick:
    """A label at a percentage of the axis, from the left or from the top."""

    at: float
    label: str


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar that stands on the axis; percentages of the plot area."""

    left: float
    width: float
    height: float
    label: str
    quiet: bool = False


@dataclasses.dataclass(frozen=True)
class Dot:
    """A point; percentages from the left and from the top."""

    x: float
    y: float
    label: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """What to draw.

    Attributes:
      x_ticks: labels under the plot.
      y_ticks: labels left of it, each with a grid line.
      lines: SVG path data in a 100 x 100 box with y downwards.
      dots: points, with what they say when pointed at.
      bars: bars, with what they say when pointed at.
      marks: labelled vertical lines.
      averaged: values averaged into one point of a line; 1 when every value is drawn.
      log: whether the y axis is logarithmic.
    """

    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[str, ...] = ()
    dots: tuple[Dot, ...] = ()
    bars: tuple[Bar, ...] = ()
    marks: tuple[Tick, ...] = ()
    averaged: int = 1
    log: bool = False


@dataclasses.dataclass(frozen=True)
class Scale:
    """From values to percent: linear, or logarithmic where ``log``."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Percent of the way from low to high.

        Example:
          >>> Scale(0.0, 8.0)(2.0), Scale(0.01, 100.0, log=True)(1.0)
          (25.0, 50.0)
        """
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return 100 * (value - low) / (high - low)


def nice_step(span: float, about: int) -> float:
    """The 1, 2 or 5 times a power of ten that cuts ``span`` into about that many parts, and never many more.

    Example:
      >>> nice_step(600, 4), nice_step(0.9, 4)
      (200.0, 0.2)
    """
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    factor = next(f for f in (1, 2, 5, 10) if f * power >= raw * 0.8)
    return round(factor * power, 12)


def linear_ticks(low: float, high: float, about: int) -> list[float]:
    """Round values in [low, high]."""
    step = nice_step(high - low, about)
    return _multiples(step, math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9))


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], every second or third of them over many decades, 2 and 5 between few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    stride = math.ceil(len(exponents) / 5)
    factors = (1, 2, 5) if len(exponents) <= 3 else (1,)
    candidates = [factor * 10.0**e for e in exponents if e % stride == 0 for factor in factors]
    return [value for value in candidates if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def value_axis(values: Sequence[float], *, log_allowed: bool = False) -> tuple[Scale, list[float]]:
    """The y axis for ``values`` and its ticks: from 0, or logarithmic where allowed and worth it.

    It is worth it where the largest is 8 times the smallest or more.

    Example:
      >>> value_axis([0.2, 2.9])
      (Scale(low=0.0, high=3.0, log=False), [0.0, 1.0, 2.0, 3.0])
    """
    low, high = min(values, default=0.0), max(values, default=0.0)
    if log_allowed and low > 0 and high / low >= 8:
        scale = Scale(low / 1.1, high * 1.1, log=True)
        return scale, log_ticks(scale.low, scale.high)
    bottom, top = min(low, 0.0), max(high, 0.0)
    if top == bottom:
        return Scale(0.0, 1.0), [0.0]
    step = nice_step(top - bottom, 3)
    first, last = math.floor(bottom / step + 1e-9), math.ceil(top / step - 1e-9)
    return Scale(round(first * step, 12), round(last * step, 12)), _multiples(step, first, last)


def _multiples(step: float, first: int, last: int) -> list[float]:
    return [round(i * step, 12) for i in range(first, last + 1)]


def line_chart(
    line: Sequence[tuple[float, float]],
    dots: Sequence[tuple[float, float]] = (),
    *,
    x_max: float,
    show: Callable[[float], str],
    labels: Callable[[Sequence[float]], list[str]] = axis_labels,
    log_allowed: bool = False,
    dot_name: str = "validation",
) -> Chart:
    """A line over steps, and single points on the same axes.

    Args:
      line: (step, value) by step; a value that is not finite leaves a gap.
      dots: (step, value).
      x_max: where the x axis ends at least.
      show: text of a value of a point.
      labels: texts of the ticks of the y axis.
      log_allowed: a logarithmic y axis where the values span much.
      dot_name: what the points are.
    """
    points, averaged = _averaged(line)
    finite_dots = [(x, y) for x, y in dots if math.isfinite(y)]
    values = [y for _, y in [*points, *finite_dots] if math.isfinite(y)]
    x = Scale(0, max([x_max, 1, *(at for at, _ in line)]))
    y, ticks = value_axis(values, log_allowed=log_allowed)
    steps = [at for at in linear_ticks(0, x.high, 3) if at == round(at)]
    return Chart(
        x_ticks=tuple(Tick(x(at), label) for at, label in zip(steps, axis_labels(steps), strict=True)),
        y_ticks=tuple(Tick(100 - y(at), label) for at, label in zip(ticks, labels(ticks), strict=True)),
        lines=(_path(points, x, y),) if points else (),
        dots=tuple(Dot(x(at), 100 - y(v), f"{dot_name} at step {at:,}: {show(v)}") for at, v in finite_dots),
        averaged=averaged,
        log=y.log,
    )


def _averaged(line: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], int]:
    """Means of runs of neighbours where there are too many points to draw, and the length of the runs."""
    size = math.ceil(len(line) / MAX_LINE_POINTS)
    if size <= 1:
        return list(line), 1
    runs = [np.asarray(line[begin : begin + size], np.float64) for begin in range(0, len(line), size)]
    return [(float(run[:, 0].mean()), float(run[:, 1].mean())) for run in runs], size


def _path(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    """SVG path data; a point between two gaps is a stroke of length 0, which round caps make visible."""
    parts, pen_down = [], False
    for at, value in points:
        if not math.isfinite(value):
            pen_down = False
            continue
        command = "L" if pen_down else "M"
        parts.append(f"{command}{x(at):.2f} {100 - y(value):.2f}" + ("" if pen_down else "h0"))
        pen_down = True
    return "".join(parts)


@dataclasses.dataclass(frozen=True)
class Column:
    """One bar before it is scaled: its extent on the x axis, its count, what it says when pointed at."""

    low: float
    high: float
    count: int
    label: str
    quiet: bool = False


def bar_chart(
    columns: Sequence[Column],
    *,
    domain: tuple[float, float],
    x_ticks: Sequence[tuple[float, str]],
    marks: Sequence[tuple[float, str]] = (),
) -> Chart:
    """Bars over a linear x axis.

    Args:
      columns: the bars.
      domain: both ends of the x axis.
      x_ticks: (position, label).
      marks: vertical lines (position, label).
    """
    x = Scale(*domain)
    y, ticks = value_axis([column.count for column in columns])
    ticks = [at for at in ticks if at == round(at)]
    return Chart(
        x_ticks=tuple(Tick(x(at), label) for at, label in x_ticks),
        y_ticks=tuple(Tick(100 - y(at), label) for at, label in zip(ticks, axis_labels(ticks), strict=True)),
        bars=tuple(Bar(x(c.low), x(c.high) - x(c.low), y(c.count), c.label, c.quiet) for c in columns if c.count),
        marks=tuple(Tick(x(at), label) for at, label in marks),
    )


def merge_bins(
    edges: Sequence[float], counts: Sequence[int], limit: int = MAX_BARS
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Joins neighbouring bins, the same number each, until at most ``limit`` are left.

    Example:
      >>> merge_bins([0, 1, 2, 3], [5, 1, 2], limit=2)
      ((0, 2, 3), (6, 2))
    """
    group = math.ceil(len(counts) / limit) if counts else 1
    starts = range(0, len(counts), group)
    merged = tuple(sum(counts[start : start + group]) for start in starts)
    return (*(edges[start] for start in starts), edges[-1]), merged
