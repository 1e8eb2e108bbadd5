"""Statistics of the rows of a set, in one pass and in float64."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_sae.errors import InputError

if TYPE_CHECKING:
    from jax_sae.data.reader import ActivationSet

_CHUNK_ROWS = 8192
_SAMPLE_ROWS = 16_384
_MEDIAN_ITERATIONS = 100


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What initialisation and centring need to know of the data.

    Attributes:
      rows: that the statistics are of.
      mean: [d] float32.
      variance: [d] float32, per dimension, ddof 0.
      geometric_median: [d] float32, of an even sample of at most 16,384 rows.
      mean_norm: mean distance of that sample from ``mean``.
      raw_mean_norm: mean norm of the rows.
      mean_over_std: norm of the mean over the norm of the standard deviations; where it is large, centring
        keeps concepts alive.
    """

    rows: int
    mean: np.ndarray
    variance: np.ndarray
    geometric_median: np.ndarray
    mean_norm: float
    raw_mean_norm: float
    mean_over_std: float

    def to_json(self) -> dict[str, Any]:
        """Plain values; float32 survives the round trip exactly."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Statistics":
        """The inverse of :meth:`to_json`."""
        arrays = ("mean", "variance", "geometric_median")
        return cls(**value | {name: np.asarray(value[name], np.float32) for name in arrays})  # type: ignore[operator]


def scan(
    activations: "ActivationSet",
    start: int = 0,
    stop: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[Statistics, np.ndarray]:
    """Reads rows ``start`` to ``stop`` once, in sequence.

    Args:
      activations: the set.
      start: first row.
      stop: one past the last row; all rows without it.
      progress: called with the number of rows of every chunk.

    Returns:
      (statistics of the finite rows, the rows with NaN or inf as int64 indices in ascending order).

    Raises:
      InputError: no row is finite, or a variance is beyond float32.
    """
    stop = activations.rows if stop is None else stop
    moments, bad = _Moments(activations.d), []
    for begin in range(start, stop, _CHUNK_ROWS):
        chunk = activations.read(begin, min(begin + _CHUNK_ROWS, stop)).astype(np.float32)
        finite = np.isfinite(chunk).all(axis=1)
        bad.append(begin + np.flatnonzero(~finite))
        moments.add(chunk if finite.all() else chunk[finite])
        if progress is not None:
            progress(len(chunk))
    bad_rows = np.concatenate(bad).astype(np.int64) if bad else np.zeros(0, np.int64)
    if moments.rows == 0:
        raise InputError(f"{activations.path} has no finite row among rows {start} to {stop}; write the set again")
    return _summarise(activations, moments, _even_sample(start, stop, bad_rows)), bad_rows


class _Moments:
    """Count, mean, sum of squared deviations and sum of norms; chunks are merged as in Chan et al. 1979."""

    def __init__(self, d: int):
        self.rows = 0
        self.mean = np.zeros(d)
        self.squares = np.zeros(d)
        self.norms = 0.0

    def add(self, chunk: np.ndarray) -> None:
        if not len(chunk):
            return
        wide = chunk.astype(np.float64)
        mean = wide.mean(axis=0)
        self.norms += float(np.sqrt((wide**2).sum(axis=1)).sum())
        wide -= mean
        total = self.rows + len(chunk)
        shift = mean - self.mean
        self.squares += (wide**2).sum(axis=0) + shift**2 * (self.rows * len(chunk) / total)
        self.mean += shift * (len(chunk) / total)
        self.rows = total


def _even_sample(start: int, stop: int, bad_rows: np.ndarray) -> np.ndarray:
    """At most ``_SAMPLE_ROWS`` evenly spaced rows that are not among ``bad_rows``."""
    sample = np.unique(np.linspace(start, stop - 1, min(stop - start, _SAMPLE_ROWS)).astype(np.int64))
    good = np.setdiff1d(sample, bad_rows, assume_unique=True)
    return good if len(good) else np.setdiff1d(np.arange(start, stop), bad_rows)[:_SAMPLE_ROWS]


def _summarise(activations: "ActivationSet", moments: _Moments, sample: np.ndarray) -> Statistics:
    rows = activations.take(sample).astype(np.float64)
    variance = moments.squares / moments.rows
    largest = float(np.max(variance))
    if largest > float(np.finfo(np.float32).max):
        raise InputError(f"{activations.path} has a variance of {largest:.1e}, beyond float32; scale it down")
    spread = float(np.sqrt(variance.sum()))
    return Statistics(
        rows=moments.rows,
        mean=moments.mean.astype(np.float32),
        variance=variance.astype(np.float32),
        geometric_median=geometric_median(rows, moments.mean).astype(np.float32),
        mean_norm=float(np.linalg.norm(rows - moments.mean, axis=1).mean()),
        raw_mean_norm=moments.norms / moments.rows,
        mean_over_std=float(np.linalg.norm(moments.mean)) / spread if spread else float(np.finfo(np.float32).max),
    )


def geometric_median(rows: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The point with the least mean distance to ``rows [n, d]``, by Weiszfeld's iteration from ``start [d]``.

    It stops when a step is below 1e-6 of the mean distance. Rows that the iterate lies on, whose weight 1 / distance
    would be infinite, hold it back by their number instead (Weiszfeld 1937; Vardi and Zhang 2000, "The multivariate
    L1-median and associated data depth").
    """
    centre = start
    for _ in range(_MEDIAN_ITERATIONS):
        distance = np.linalg.norm(rows - centre, axis=1)
        scale = distance.mean()
        if scale == 0:
            return centre
        apart = distance > 1e-9 * scale
        weight = np.where(apart, 1 / np.where(apart, distance, 1), 0)
        shift = weight @ rows / weight.sum() - centre
        pull = np.linalg.norm(shift) * weight.sum()  # of unit vectors towards the other rows
        held = np.count_nonzero(~apart) / pull if pull else 1.0
        step = shift * max(0.0, 1 - held)
        centre = centre + step
        if np.linalg.norm(step) < 1e-6 * scale:
            break
    return centre
