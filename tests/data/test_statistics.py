"""Statistics against float64 NumPy and SciPy."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import scipy.optimize

from jax_sae.data import ActivationSet, ActivationWriter, Statistics, open_activations, scan, statistics
from jax_sae.errors import InputError


def stored(folder: Path, rows: np.ndarray) -> ActivationSet:
    """A set of ``rows`` in two files, NaN allowed."""
    folder.mkdir()
    np.save(folder / "a.npy", rows[: len(rows) // 3])
    np.save(folder / "b.npy", rows[len(rows) // 3 :])
    return open_activations(folder)


def normal(rows: int, d: int, offset: float = 0.0) -> np.ndarray:
    """Float32 rows whose dimensions have standard deviations 1 to d."""
    generator = np.random.default_rng(0)
    return (offset + generator.normal(size=(rows, d)) * np.arange(1, d + 1)).astype(np.float32)


def check_moments(found: Statistics, rows: np.ndarray, rtol: float = 1e-6) -> None:
    """Holds what is summed over all rows to two-pass float64."""
    wide = rows.astype(np.float64)
    assert found.rows == len(rows)
    assert found.mean.dtype == found.variance.dtype == found.geometric_median.dtype == np.float32
    np.testing.assert_allclose(found.mean, wide.mean(0), rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(found.variance, wide.var(0), rtol=rtol)
    np.testing.assert_allclose(found.raw_mean_norm, np.linalg.norm(wide, axis=1).mean(), rtol=rtol)
    ratio = np.linalg.norm(wide.mean(0)) / np.sqrt(wide.var(0).sum())
    np.testing.assert_allclose(found.mean_over_std, ratio, rtol=rtol)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_of_rows_far_from_zero(tmp_path, offset):
    rows = normal(20_000, 5, offset)  # three chunks
    found, bad = scan(stored(tmp_path / "set", rows))
    check_moments(found, rows)
    assert bad.dtype == np.int64 and bad.shape == (0,)
    distance = np.linalg.norm(rows - rows.mean(0, dtype=np.float64), axis=1).mean()
    np.testing.assert_allclose(found.mean_norm, distance, rtol=0.01)  # of 16,384 of the rows


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_moments_of_narrow_dtypes_are_of_the_stored_values(tmp_path, dtype):
    rows = normal(3000, 4, offset=3).astype(dtype)
    with ActivationWriter(tmp_path, d=4, dtype=dtype) as writer:
        writer.append(rows)
        found = open_activations(writer.close()).statistics
    assert found is not None
    check_moments(found, rows)


def test_rows_that_are_not_finite_are_located_and_left_out(tmp_path):
    rows = normal(20_000, 3)
    bad = np.array([0, 1, 8191, 8192, 15_000, 19_999])
    rows[bad[::2], 1], rows[bad[1], 0], rows[bad[3::2]] = np.nan, np.inf, -np.inf
    found, located = scan(stored(tmp_path / "set", rows))
    np.testing.assert_array_equal(located, bad)
    check_moments(found, np.delete(rows, bad, axis=0))
    assert np.isfinite(found.geometric_median).all() and np.isfinite(found.mean_norm)


def test_a_range_of_rows(tmp_path):
    rows = normal(500, 3)
    rows[[100, 350, 399, 400]] = np.nan
    read = []
    found, located = scan(stored(tmp_path / "set", rows), 101, 400, progress=read.append)
    np.testing.assert_array_equal(located, [350, 399])
    check_moments(found, np.delete(rows[101:400], located - 101, axis=0))
    assert sum(read) == 299


def test_the_statistics_of_a_set_are_of_its_training_rows(tmp_path):
    rows = normal(300, 3)
    rows[200:] += 1000
    with ActivationWriter(tmp_path, d=3, shard_rows=90) as writer:
        writer.append(rows)
        activations = open_activations(writer.close(holdout_rows=100))
    assert activations.statistics is not None
    check_moments(activations.statistics, rows[:200])
    assert np.abs(activations.statistics.geometric_median).max() < 2


def test_the_sample_of_rows_steps_around_those_that_are_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "_SAMPLE_ROWS", 4)
    rows = normal(10, 3)
    rows[[0, 3, 6, 9]] = np.nan  # the even sample exactly
    found, _ = scan(stored(tmp_path / "set", rows))
    used = rows[[1, 2, 4, 5]]
    distance = np.linalg.norm(used - np.delete(rows, [0, 3, 6, 9], axis=0).mean(0, dtype=np.float64), axis=1)
    np.testing.assert_allclose(found.mean_norm, distance.mean(), rtol=1e-6)


def test_equal_rows(tmp_path):
    rows = np.tile(np.float32([3, 4]), (50, 1))
    found, _ = scan(stored(tmp_path / "set", rows))
    np.testing.assert_array_equal(found.geometric_median, [3, 4])
    np.testing.assert_array_equal(found.variance, [0, 0])
    assert (found.mean_norm, found.raw_mean_norm) == (0, 5)
    assert found.mean_over_std == np.finfo(np.float32).max  # JSON has no infinity


@pytest.mark.parametrize("rows", [np.full((9, 2), np.nan, np.float32), np.full((9, 2), np.inf, np.float32)])
def test_a_set_without_a_finite_row_is_refused(tmp_path, rows):
    with pytest.raises(InputError, match=r"has no finite row among rows 0 to 9; write the set again$"):
        scan(stored(tmp_path / "set", rows))


def test_a_variance_beyond_float32_is_refused(tmp_path):
    rows = normal(30, 2) * np.float32(1e25)
    with pytest.raises(InputError, match=r"has a variance of \d.\de\+50, beyond float32; scale it down$"):
        scan(stored(tmp_path / "set", rows))


def test_json_keeps_every_bit(tmp_path):
    found, _ = scan(stored(tmp_path / "set", normal(100, 3, offset=0.1)))
    again = Statistics.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    for field in dataclasses.fields(Statistics):
        one, other = getattr(found, field.name), getattr(again, field.name)
        np.testing.assert_array_equal(one, other)
        assert np.asarray(one).dtype == np.asarray(other).dtype


# The geometric median


def mean_distance(centre: np.ndarray, rows: np.ndarray) -> tuple[float, np.ndarray]:
    """The objective and its gradient."""
    offset = centre - rows
    distance = np.linalg.norm(offset, axis=1)
    return distance.mean(), (offset / distance[:, None]).mean(0)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("outliers", [0, 120])
def test_geometric_median_is_the_minimum_that_scipy_finds(offset, outliers):
    rows = normal(400, 6, offset).astype(np.float64)
    rows[:outliers] += 300 * np.arange(6)
    best = scipy.optimize.minimize(
        mean_distance, np.median(rows, axis=0), rows, jac=True, method="BFGS", options={"gtol": 1e-10}
    )
    found = statistics.geometric_median(rows, rows.mean(0))
    scale = mean_distance(best.x, rows)[0]
    assert np.linalg.norm(found - best.x) < 1e-4 * scale
    assert mean_distance(found, rows)[0] <= scale * (1 + 1e-8)


def test_geometric_median_of_points_on_a_line_is_their_median():
    rows = np.array([[0.0], [1.0], [2.0], [3.5], [100.0]])
    np.testing.assert_allclose(statistics.geometric_median(rows, rows.mean(0)), [2.0], atol=1e-2)


def test_geometric_median_from_a_row():
    rows = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0], [4.0, 3.0]])
    # Of a convex quadrilateral: where the diagonals cross. A start on a row must not stay there.
    np.testing.assert_allclose(statistics.geometric_median(rows, rows[0]), [2.0, 1.5], atol=1e-4)


def test_geometric_median_stays_on_a_row_that_holds_it():
    corners = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0], [4.0, 3.0]])
    # The three other corners pull with |(1, 0) + (0, 1) + (0.8, 0.6)| = 2.41: three rows hold, two do not.
    for copies, stays in [(2, True), (1, False)]:
        rows = np.concatenate([corners, np.tile(corners[:1], (copies, 1))])
        found = statistics.geometric_median(rows, rows[0])
        assert np.array_equal(found, rows[0]) == stays


def test_geometric_median_of_a_set_hardly_moves_with_outliers(tmp_path):
    rows = normal(1000, 3)
    rows[::10] += 1e4
    found, _ = scan(stored(tmp_path / "set", rows))
    assert np.abs(found.mean).min() > 900
    assert np.abs(found.geometric_median).max() < 1
