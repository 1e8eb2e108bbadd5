"""Derivatives of sparsemax against the closed form and finite differences, under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_sae
from jax_sae import sparsemax
from tests.ops.reference import jacobian, scores, sparsemax_rows

IMPLEMENTATIONS = ["xla", "sort"]

sparsemax_jvp = jax.jit(jax_sae.sparsemax_jvp, static_argnames=("axis", "implementation"))


def products(z, vectors):
    """The Jacobian of every row times its vector, in float64."""
    return np.stack([jacobian(p) @ v for p, v in zip(sparsemax_rows(z)[0], np.asarray(vectors, float), strict=True)])


def jitted_vjp(f, z, cotangent):
    return jax.jit(lambda z, g: jax.vjp(f, z)[1](g)[0])(z, cotangent)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [0.01, 0.5, 100.0])
def test_the_jacobian_is_the_closed_form_in_both_modes(implementation, scale):
    z = scores(1, 30, scale)[0]
    expected = jacobian(sparsemax_rows(z[None])[0][0])
    f = functools.partial(sparsemax, implementation=implementation)
    np.testing.assert_allclose(jax.jit(jax.jacrev(f))(z), expected, atol=1e-6)
    columns = jax.vmap(lambda direction: sparsemax_jvp(z, direction, implementation=implementation)[1])
    np.testing.assert_allclose(jax.jit(columns)(jnp.eye(30)), expected, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_first_derivatives_equal_finite_differences(implementation):
    with jax.enable_x64(True):
        z, direction = (np.random.default_rng(seed).standard_normal((4, 50)) * 0.2 for seed in (0, 1))
        f = jax.jit(functools.partial(sparsemax, implementation=implementation))
        p, tangent = sparsemax_jvp(z, direction, implementation=implementation)
        step = 1e-7
        numeric = (np.asarray(f(z + step * direction)) - np.asarray(f(z - step * direction))) / (2 * step)
    np.testing.assert_allclose(p, sparsemax_rows(z)[0], atol=1e-15)
    np.testing.assert_allclose(tangent, numeric, atol=1e-8)


def test_second_derivatives_equal_finite_differences():
    with jax.enable_x64(True):
        z, weights = (np.random.default_rng(seed).standard_normal(12) * scale for seed, scale in ((3, 0.1), (4, 1.0)))
        loss = lambda z: jnp.sum(weights * sparsemax(z) ** 3)
        gradient, step = jax.jit(jax.grad(loss)), 1e-6
        numeric = [(gradient(z + step * e) - gradient(z - step * e)) / (2 * step) for e in np.eye(12)]
        assert np.abs(numeric).max() > 0.1
        for hessian in (jax.jacrev(jax.jacrev(loss)), jax.jacfwd(jax.jacrev(loss)), jax.hessian(loss)):
            np.testing.assert_allclose(jax.jit(hessian)(z), numeric, atol=1e-8)


def test_forward_mode_by_name_may_be_differentiated_in_either_mode():
    with jax.enable_x64(True):
        z, direction, weights = (np.random.default_rng(seed).standard_normal(10) * 0.4 for seed in (3, 4, 5))
        slope = lambda z: jnp.sum(weights * sparsemax_jvp(z, direction * z**2)[1])
        value, step = jax.jit(slope), 1e-6
        numeric = [(value(z + step * e) - value(z - step * e)) / (2 * step) for e in np.eye(10)]
        assert np.abs(numeric).max() > 0.1
        np.testing.assert_allclose(jax.jit(jax.grad(slope))(z), numeric, atol=1e-8)
        np.testing.assert_allclose(jax.jit(jax.jacfwd(slope))(z), numeric, atol=1e-8)


@pytest.mark.parametrize("transform", ["jit", "vmap", "scan", "checkpoint", "a batch inside vmap"])
def test_reverse_mode_under(transform):
    z, g = scores(6, 90, 0.3), scores(6, 90, seed=1)
    loss = lambda z, g: jnp.sum(sparsemax(z) * g)
    gradient = {
        "jit": jax.grad(loss),
        "vmap": jax.vmap(jax.grad(loss)),
        "scan": jax.grad(lambda z, g: jax.lax.scan(lambda total, x: (total + loss(*x), None), 0.0, (z, g))[0]),
        "checkpoint": jax.grad(lambda z, g: jnp.sum(jax.checkpoint(sparsemax)(z) * g)),
        "a batch inside vmap": jax.vmap(lambda z, g: jitted_vjp(sparsemax, z[None], g[None])[0]),
    }[transform]
    np.testing.assert_allclose(jax.jit(gradient)(z, g), products(z, g), atol=1e-6)


def test_both_modes_along_a_middle_axis():
    z, g = scores(10, 9, 0.5), scores(10, 9, seed=1)
    expected = np.moveaxis(products(z, g).reshape(2, 5, 9), -1, 1)
    z, g = (jnp.moveaxis(x.reshape(2, 5, 9), -1, 1) for x in (z, g))
    np.testing.assert_allclose(jitted_vjp(functools.partial(sparsemax, axis=1), z, g), expected, atol=1e-6)
    np.testing.assert_allclose(sparsemax_jvp(z, g, axis=1)[1], expected, atol=1e-6)


def test_an_entry_tied_with_the_threshold_has_derivative_0():
    np.testing.assert_array_equal(jax.jacrev(sparsemax)(jnp.array([1.0, 0.0, -1.0])), np.zeros((3, 3)))


def test_entries_that_take_no_part_have_derivative_0():
    z, g, keep = scores(5, 30), scores(5, 30, seed=1), np.arange(30) % 4 > 0
    masked = functools.partial(sparsemax, where=keep[None])
    expected = np.zeros_like(z)
    expected[:, keep] = products(z[:, keep], g[:, keep])
    z[:, ~keep] = np.nan
    np.testing.assert_allclose(jitted_vjp(masked, z, g), expected, atol=1e-6)
    g[:, ~keep] = np.nan
    np.testing.assert_allclose(sparsemax_jvp(z, g, where=keep[None])[1], expected, atol=1e-6)


def test_undefined_rows_have_nan_derivatives_and_leave_others_alone():
    z, g = scores(5, 20), scores(5, 20, seed=1)
    expected = products(z, g)
    z[1, 3], z[3] = np.nan, -np.inf
    for got in (jitted_vjp(sparsemax, z, g), sparsemax_jvp(z, g)[1]):
        assert np.isnan(got[np.array([1, 3])]).all()
        np.testing.assert_allclose(got[np.array([0, 2, 4])], expected[[0, 2, 4]], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_derivatives_are_summed_in_float32(dtype):
    z, g = jnp.asarray(scores(3, 2000, 1e-4), dtype), jnp.asarray(scores(3, 2000, seed=1), dtype)
    expected = products(np.asarray(z, np.float64), g)
    for got in (jitted_vjp(sparsemax, z, g), sparsemax_jvp(z, g)[1]):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=float(jnp.finfo(dtype).eps), atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_reverse_mode_keeps_p_and_nothing_else(implementation, dtype):
    z = jnp.asarray(scores(4, 64), dtype)
    f = functools.partial(sparsemax, implementation=implementation)
    p, pullback = jax.jit(lambda z: jax.vjp(f, z))(z)
    (kept,) = jax.tree.leaves(pullback)
    assert kept.dtype == dtype
    np.testing.assert_array_equal(kept, p)


def test_reverse_mode_through_forward_mode_keeps_p_and_nothing_of_its_size():
    z, direction = jnp.asarray(scores(4, 64)), jnp.asarray(scores(4, 64, seed=1))
    (p, _), pullback = jax.jit(lambda d: jax.vjp(lambda d: sparsemax_jvp(z, d), d))(direction)
    (kept,) = (leaf for leaf in jax.tree.leaves(pullback) if leaf.shape == z.shape)
    np.testing.assert_array_equal(kept, p)
