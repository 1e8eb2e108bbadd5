"""Charts of labelled points, two numbers each: where markers, labels and the Pareto front stand, in percent."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from .charts import Dot, Scale, Tick, linear_ticks, log_ticks
from .report_text import axis_labels

# A label, in percent of a plot area of about 900 x 380 pixels; narrower pages hide the labels.
_CHARACTER, _LINE, _GAP = 0.82, 4.6, 1.3


@dataclasses.dataclass(frozen=True)
class Point:
    """What is drawn of one group.

    Attributes:
      x: above 0.
      y: any number.
      label: beside the marker.
      family: which marker: points of one family share it.
      seeds: (x, y) of the runs that the point is the mean of; drawn where there are several.
    """

    x: float
    y: float
    label: str
    family: int
    seeds: tuple[tuple[float, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Marker:
    """A marker of a family; ``label`` is what it says when pointed at."""

    x: float
    y: float
    label: str
    family: int


@dataclasses.dataclass(frozen=True)
class Label:
    """Text that begins (or ends, where ``left``) at a place, and SVG path data of the line to its marker, if any."""

    x: float
    y: float
    text: str
    left: bool
    leader: str


@dataclasses.dataclass(frozen=True)
class Scatter:
    """What to draw, as :class:`train.charts.Chart`; ``front`` is SVG path data."""

    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    front: str
    seeds: tuple[Dot, ...]
    markers: tuple[Marker, ...]
    labels: tuple[Label, ...]
    log: bool


def scatter(points: Sequence[Point], show: Callable[[Point], str]) -> Scatter:
    """The points over a logarithmic x axis, with the front of those that no other beats in both numbers.

    Args:
      points: at least one.
      show: what the marker of a point says when pointed at.
    """
    runs = [pair for point in points for pair in (*point.seeds, (point.x, point.y))]
    x = _padded([at for at, _ in runs], log=True)
    heights = [height for _, height in runs]
    y = _padded(heights, log=min(heights) > 0 and max(heights) / min(heights) >= 8)
    x_ticks, y_ticks = _ticks(x), _ticks(y)
    markers = tuple(Marker(x(p.x), 100 - y(p.y), show(p), p.family) for p in points)
    corners = [(x(p.x), 100 - y(p.y)) for p in pareto_front(points)]
    return Scatter(
        x_ticks=tuple(Tick(x(at), label) for at, label in zip(x_ticks, axis_labels(x_ticks), strict=True)),
        y_ticks=tuple(Tick(100 - y(at), label) for at, label in zip(y_ticks, axis_labels(y_ticks), strict=True)),
        front=_front_path(corners),
        seeds=tuple(Dot(x(at), 100 - y(height), p.label) for p in points if len(p.seeds) > 1 for at, height in p.seeds),
        markers=markers,
        labels=tuple(_place_labels(markers, [p.label for p in points], corners)),
        log=y.log,
    )


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other equals or beats in both numbers, less being better, by x.

    Example:
      >>> front = pareto_front([Point(1, 9, "a", 0), Point(2, 9, "b", 0), Point(4, 3, "c", 0)])
      >>> [point.label for point in front]
      ['a', 'c']
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not front or point.y < front[-1].y:
            front.append(point)
    return front


def _padded(values: Sequence[float], *, log: bool) -> Scale:
    """A scale with room on both sides of the values."""
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** 0.08, 1.15)
        return Scale(low / room, high * room, log=True)
    room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    bottom = low - room if low < 0 else max(low - room, 0.0)
    return Scale(bottom, high + room)


def _ticks(scale: Scale) -> list[float]:
    """Round values: on a log scale 1, 2, 5 and so on, powers of ten where those are many, linear ones where few."""
    if not scale.log:
        return linear_ticks(scale.low, scale.high, 5)
    powers = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    ticks = [at for at in ticks if scale.low <= at <= scale.high]
    if len(ticks) > 8:
        return log_ticks(scale.low, scale.high)
    return ticks if len(ticks) >= 3 else linear_ticks(scale.low, scale.high, 5)


def _front_path(corners: Sequence[tuple[float, float]]) -> str:
    """Steps: to the right at the height of a point, then down to the next."""
    if len(corners) < 2:
        return ""
    start = f"M{corners[0][0]:.2f} {corners[0][1]:.2f}"
    return start + "".join(f"H{at:.2f}V{height:.2f}" for at, height in corners[1:])


@dataclasses.dataclass(frozen=True)
class _Box:
    left: float
    right: float
    top: float
    bottom: float

    def meets(self, other: "_Box") -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    @property
    def inside(self) -> bool:
        return self.left >= 0 and self.right <= 102 and self.top >= -4 and self.bottom <= 100


def _place_labels(
    markers: Sequence[Marker], texts: Sequence[str], corners: Sequence[tuple[float, float]]
) -> Iterator[Label]:
    """A label beside each marker, moved up or down where it would cover another label, a marker or the front."""
    taken = [_Box(m.x - 0.9, m.x + 0.9, m.y - 2.1, m.y + 2.1) for m in markers]
    for (x, y), (next_x, next_y) in itertools.pairwise(corners):
        taken += [_Box(x, next_x, y - 0.5, y + 0.5), _Box(next_x - 0.1, next_x + 0.1, y, next_y)]
    for marker, text in zip(markers, texts, strict=True):
        candidates = list(_candidates(marker, text))
        free = (c for c in candidates if c[0].inside and not any(c[0].meets(box) for box in taken))
        box, label = next(free, candidates[0])
        taken.append(box)
        yield label


def _candidates(marker: Marker, text: str) -> Iterator[tuple[_Box, Label]]:
    """Places for a label, the nearest first: beside the marker, then further up and down."""
    width = _CHARACTER * len(text)
    for step, left in itertools.product((0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5), (False, True)):
        gap = _GAP if step == 0 else 2 * _GAP
        x, y = marker.x + (-gap if left else gap), marker.y + step * _LINE
        start = x - width if left else x
        end = x + (0.4 if left else -0.4)
        leader = f"M{marker.x:.2f} {marker.y:.2f}L{end:.2f} {y:.2f}" if step else ""
        yield _Box(start, start + width, y - _LINE / 2, y + _LINE / 2), Label(x, y, text, left, leader)
