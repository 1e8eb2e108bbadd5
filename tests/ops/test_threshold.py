"""The threshold and the size of the support against float64 sorting, and how Newton's method ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_sae
from jax_sae.ops.sparsemax import xla
from tests.ops.reference import sparsemax_rows

IMPLEMENTATIONS = ["xla", "xla on a TPU", "xla on a GPU", "sort"]

sparsemax = jax.jit(jax_sae.sparsemax, static_argnames="implementation")
sparsemax_threshold = jax.jit(jax_sae.sparsemax_threshold, static_argnames=("axis", "implementation"))


def scores(rows, width, scale=1.0, seed=0):
    return (scale * np.random.default_rng(seed).standard_normal((rows, width))).astype(np.float32)


def crowded(rows, width, seed=0):
    """Rows with up to half of their entries well inside the support, and the others within three floats of tau."""
    rng = np.random.default_rng(seed)
    z = np.empty((rows, width), np.float32)
    for row in z:
        n = rng.integers(1, width // 2)
        row[:n] = rng.uniform(0, 2 / n, n)
        tau = np.float32((row[:n].sum(dtype=np.float64) - 1) / n)
        row[n:] = tau + np.spacing(tau) * rng.integers(-3, 4, width - n)
    return z


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_any_axis_is_removed_from_the_shape(implementation, axis):
    z = scores(6, 70, 0.2).reshape(2, 3, 70)
    rows = np.moveaxis(z, axis, -1)
    _, tau, count = sparsemax_rows(rows.reshape(-1, rows.shape[-1]))
    got_tau, got_count = sparsemax_threshold(jnp.asarray(z), axis, implementation=implementation)
    assert got_tau.dtype == jnp.float32 and got_count.dtype == jnp.int32
    np.testing.assert_allclose(got_tau, tau.reshape(rows.shape[:-1]), atol=1e-6)
    np.testing.assert_array_equal(got_count, count.reshape(rows.shape[:-1]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_with_a_known_threshold(implementation):
    inf, nan = np.inf, np.nan
    rows = [
        ([7.0, 7.0, 7.0, 7.0], 6.75, 4),
        ([1.0, 1.0, 0.5, 0.0], 0.5, 2),  # the third entry is tied with tau
        ([1.0, 0.0, -5.0, -inf], 0.0, 1),
        ([-40.0, -40.5, -42.0, -42.0], -40.75, 2),
        ([0.25, 0.25, -0.25, -0.25], -0.25, 2),
        ([0.125, 0.0, -0.125, -0.0], -0.25, 4),  # below 0: negative scores are in the support
        ([1e30, -1e30, 0.0, 1.0], 1e30, 1),
        ([3e38, 3e38, -3e38, -inf], 3e38, 2),
        ([-inf, -inf, 2.0, -inf], 1.0, 1),
        ([nan, 1.0, 0.0, 0.0], nan, 0),
        ([inf, 1.0, 0.0, 0.0], nan, 0),
        ([inf, -inf, inf, nan], nan, 0),
        ([-inf, -inf, -inf, -inf], nan, 0),
    ]
    z, expected, support = (np.array(column) for column in zip(*rows, strict=True))
    tau, count = sparsemax_threshold(jnp.asarray(z, jnp.float32), implementation=implementation)
    np.testing.assert_array_equal(tau, expected.astype(np.float32))
    np.testing.assert_array_equal(count, support)


@pytest.mark.parametrize("width", [1, 2, 511, 1023, 1024, 1025, 5000])
def test_newton_equals_sorting_around_the_sizes_of_groups_and_chunks(width):
    z = np.concatenate([scores(5, width, scale, seed) for seed, scale in enumerate((1e-4, 0.01, 1.0, 100.0))])
    _, tau, count = sparsemax_rows(z)
    got_tau, got_count = sparsemax_threshold(z)
    np.testing.assert_allclose(got_tau, tau, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got_count, count)


@pytest.mark.parametrize("sweep", [xla._chunked_sums, xla._plain_sums])
def test_newton_for_cpus_and_for_accelerators_agree(sweep):
    z = scores(6, 3000, 0.02)
    top, tau, count = jax.jit(functools.partial(xla._solve, axis_name=None, sweep=sweep))(z)
    _, expected_tau, expected_count = sparsemax_rows(z)
    np.testing.assert_allclose((top + tau)[:, 0], expected_tau, atol=1e-6)
    np.testing.assert_array_equal(count[:, 0], expected_count)


@pytest.mark.parametrize("sweep", [xla._chunked_sums, xla._plain_sums])
@pytest.mark.parametrize("width", [33, 1100])
def test_newton_ends_where_rounding_decides_the_support(monkeypatch, sweep, width):
    """2,000 rows together: a third of them would go up and down for ever, or keep the others going."""
    z = crowded(2000, width)
    results = []
    for sweeps in (30, 31):
        monkeypatch.setattr(xla, "_MAX_SWEEPS", sweeps)
        results.append(jax.jit(functools.partial(xla._solve, axis_name=None, sweep=sweep))(z))
    for after_30, after_31 in zip(*results, strict=True):
        np.testing.assert_array_equal(after_30, after_31)
    top, tau, _ = results[0]
    np.testing.assert_allclose((top + tau)[:, 0], sparsemax_rows(z)[1], atol=5e-7)


def test_newton_equals_sorting_where_rounding_decides_the_support():
    z = crowded(2000, 40, seed=1)
    p = [sparsemax(z, implementation=name) for name in IMPLEMENTATIONS]
    np.testing.assert_allclose(p[0], p[1], atol=5e-7)
    np.testing.assert_allclose(p[0], sparsemax_rows(z)[0], atol=5e-7)


def test_a_mask_over_another_axis_is_broadcast():
    z, keep = scores(6, 20).reshape(2, 3, 20), np.arange(20) % 3 > 0
    tau, count = sparsemax_threshold(jnp.asarray(z), where=jnp.asarray(keep)[None, None])
    _, expected_tau, expected_count = sparsemax_rows(z[..., keep].reshape(6, -1))
    np.testing.assert_allclose(tau.ravel(), expected_tau, atol=1e-6)
    np.testing.assert_array_equal(count.ravel(), expected_count)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint8])
def test_every_dtype_but_float64_has_a_float32_threshold(dtype):
    z = jnp.asarray(np.abs(scores(8, 60, 3.0)), dtype)
    tau, count = sparsemax_threshold(z)
    _, expected_tau, expected_count = sparsemax_rows(np.asarray(z, np.float64))
    assert tau.dtype == jnp.float32
    np.testing.assert_allclose(tau, expected_tau, atol=1e-6)
    np.testing.assert_array_equal(count, expected_count)


def test_float64_has_a_float64_threshold():
    with jax.enable_x64(True):
        z = np.random.default_rng(0).standard_normal((4, 300)) * 0.05
        tau, count = sparsemax_threshold(jnp.asarray(z))
        assert tau.dtype == jnp.float64 and count.dtype == jnp.int32
        np.testing.assert_allclose(tau, sparsemax_rows(z)[1], atol=1e-15)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_its_derivative_is_the_mean_over_the_support(implementation):
    z, dz = jnp.asarray(scores(5, 40, 0.5)), scores(5, 40, seed=1)
    support = sparsemax_rows(z)[0] > 0
    mean = support / support.sum(-1, keepdims=True)
    f = lambda z: sparsemax_threshold(z, implementation=implementation)[0]
    np.testing.assert_allclose(jax.vjp(f, z)[1](jnp.arange(5.0))[0], np.arange(5)[:, None] * mean, atol=1e-6)
    np.testing.assert_allclose(jax.jvp(f, (z,), (jnp.asarray(dz),))[1], (mean * dz).sum(-1), atol=1e-6)


def test_entries_tied_with_the_threshold_and_masked_ones_have_no_part_in_its_derivative():
    z, keep = jnp.array([1.0, 1.0, 0.5, 3.0]), jnp.array([True, True, True, False])
    gradient = jax.grad(lambda z: sparsemax_threshold(z, where=keep)[0])(z)
    np.testing.assert_array_equal(gradient, [0.5, 0.5, 0.0, 0.0])


def test_the_derivative_of_an_undefined_threshold_is_nan_in_its_own_row_alone():
    z = jnp.asarray(scores(3, 8)).at[1, 2].set(jnp.nan)
    gradient = np.asarray(jax.grad(lambda z: jnp.sum(sparsemax_threshold(z)[0]))(z))
    assert np.isnan(gradient[1]).any()
    np.testing.assert_allclose(gradient[[0, 2]].sum(-1), 1, atol=1e-6)
