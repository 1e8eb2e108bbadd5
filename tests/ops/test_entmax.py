"""entmax and its derivatives against float64 bisection, sorting, finite differences and the closed-form Jacobian."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_sae
from tests.ops.reference import entmax15_rows, entmax_jacobian, entmax_rows, scores, sparsemax_rows

ALPHAS = [1.05, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0]

entmax = jax.jit(jax_sae.entmax, static_argnames="axis")
by_rows_reverse, by_rows_forward = (jax.jit(mode(jax_sae.entmax)) for mode in (jax.jacrev, jax.jacfwd))
by_alpha_reverse, by_alpha_forward = (jax.jit(mode(jax_sae.entmax, argnums=1)) for mode in (jax.jacrev, jax.jacfwd))


def tolerance(alpha, dtype=np.float32):
    """Rounding errors of a few eps in tau, which at the edge of the support are taken to the power 1 / (alpha - 1)."""
    eps = 8 * float(np.finfo(dtype).eps)
    return 4 * eps ** min(1, 1 / (alpha - 1))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("width", [1, 2, 129, 3000])
def test_equals_float64_bisection_at_every_scale(alpha, width):
    z = np.concatenate([scores(5, width, scale) for scale in (1e-4, 0.01, 0.1, 1.0, 10.0, 100.0)])
    z = np.concatenate([z, np.round(4 * scores(5, width)) / 8, np.zeros((1, width), np.float32)])  # ties
    got = np.asarray(entmax(z, alpha))
    np.testing.assert_allclose(got, entmax_rows(z, alpha), atol=tolerance(alpha))
    np.testing.assert_allclose(got.sum(-1, dtype=np.float64), 1, atol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_float64_stays_float64(alpha):
    with jax.enable_x64(True):
        z = np.concatenate([scores(4, 500, scale).astype(np.float64) for scale in (1e-3, 0.1, 10.0)])
        got = entmax(z, alpha)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, entmax_rows(z, alpha), atol=tolerance(alpha, np.float64))


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("offset", [1000.0, -1000.0, 1e6])
def test_an_offset_common_to_a_row_costs_nothing(alpha, offset):
    z = scores(16, 200, 0.5) + np.float32(offset)  # rounded to what float32 holds, then equal in both precisions
    np.testing.assert_allclose(entmax(z, alpha), entmax_rows(z, alpha), atol=tolerance(alpha))


def test_alpha_2_is_sparsemax():
    z = np.concatenate([scores(8, 700, scale) for scale in (0.01, 0.3, 5.0)] + [np.round(4 * scores(8, 700)) / 8])
    got, (expected, _, _) = np.asarray(entmax(z, 2.0)), sparsemax_rows(z)
    np.testing.assert_allclose(got, expected, atol=3e-7)
    np.testing.assert_array_equal(got > 0, expected > 0)


def test_alpha_one_and_a_half_is_the_closed_form_by_sorting():
    z = np.concatenate([scores(8, 700, scale) for scale in (0.01, 0.3, 5.0)] + [np.round(4 * scores(8, 700)) / 8])
    got, expected = np.asarray(entmax(z)), entmax15_rows(z)
    np.testing.assert_allclose(got, expected, atol=3e-7)
    clear = np.abs(np.sqrt(expected)) > 1e-5  # p is the square of the distance from the threshold
    assert (got[clear] > 0).all() and (got[~clear] < 1e-9).all()


def test_near_alpha_1_it_is_nearly_softmax():
    with jax.enable_x64(True):
        z = np.random.default_rng(0).standard_normal((4, 50))
        np.testing.assert_allclose(entmax(z, 1 + 1e-5), jax.nn.softmax(z), atol=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_rows_with_a_known_answer(alpha):
    inf = np.inf
    rows = [
        ([7.0, 7.0, 7.0, 7.0], [0.25, 0.25, 0.25, 0.25]),
        ([0.0, 0.0, -30.0, -30.0], [0.5, 0.5, 0.0, 0.0]),
        ([1e30, -1e30, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]),
        ([1e30, 1e30, 1e30, 9e29], [1 / 3, 1 / 3, 1 / 3, 0.0]),
        ([3e38, -3e38, -3e38, 3e38], [0.5, 0.0, 0.0, 0.5]),
        ([0.5, -inf, 0.5, -inf], [0.5, 0.0, 0.5, 0.0]),
        ([-inf, -inf, -inf, -1e30], [0.0, 0.0, 0.0, 1.0]),
    ]
    z, expected = (np.array(column, np.float32) for column in zip(*rows, strict=True))
    np.testing.assert_allclose(entmax(z, alpha), expected, atol=2e-6)


@pytest.mark.parametrize("alpha", [1.25, 2.0, 2.5])
def test_minus_infinity_takes_no_part(alpha):
    z = scores(6, 40)
    z[:, ::3] = -np.inf
    keep = np.arange(40) % 3 > 0
    got = np.asarray(entmax(z, alpha))
    assert not got[:, ~keep].any()
    np.testing.assert_allclose(got[:, keep], entmax_rows(z[:, keep], alpha), atol=tolerance(alpha))


@pytest.mark.parametrize("alpha", [1.25, 2.0, 2.5])
def test_rows_without_a_projection_are_nan_and_leave_others_alone(alpha):
    z, g = scores(8, 30), scores(8, 30, seed=1)
    z[1, 15], z[2, 0], z[3], z[4, :2], z[7, -1] = np.nan, np.inf, -np.inf, (np.nan, np.inf), np.nan
    undefined = [1, 2, 3, 4, 7]
    got, pullback = jax.vjp(lambda z: entmax(z, alpha), jnp.asarray(z))
    (gradient,) = pullback(jnp.asarray(g))
    assert np.isnan(np.asarray(got)[undefined]).all() and np.isnan(np.asarray(gradient)[undefined]).all()
    expected = entmax_rows(np.delete(z, undefined, 0), alpha)
    np.testing.assert_allclose(np.delete(got, undefined, 0), expected, atol=tolerance(alpha))
    products = [entmax_jacobian(p, alpha) @ v for p, v in zip(expected, np.delete(g, undefined, 0), strict=True)]
    defined = np.delete(np.asarray(gradient), undefined, 0)
    if alpha <= 2:
        np.testing.assert_allclose(defined, products, atol=1e-5)
    assert np.isfinite(defined).all()


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_any_axis_of_any_batch(axis):
    z = scores(6, 20).reshape(2, 3, 20)
    moved = np.moveaxis(z, axis, -1)
    expected = np.moveaxis(entmax_rows(moved.reshape(-1, moved.shape[-1]), 1.5).reshape(moved.shape), -1, axis)
    np.testing.assert_allclose(entmax(z, axis=axis), expected, atol=1e-6)


def test_bfloat16_is_projected_in_float32():
    z = jnp.asarray(scores(8, 300, 0.1), jnp.bfloat16)
    got = entmax(z, 1.25)
    assert got.dtype == jnp.bfloat16
    expected = entmax_rows(np.asarray(z, np.float64), 1.25)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2**-8, atol=3e-7)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8, jnp.uint8])
def test_integers_become_float32(dtype):
    got = entmax(jnp.array([3, 3, 0], dtype), 2)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, [0.5, 0.5, 0])


def test_empty_batches_pass():
    assert entmax(jnp.zeros((0, 5))).shape == (0, 5)
    assert entmax(jnp.zeros((3, 0, 5)), axis=0).shape == (3, 0, 5)


def test_what_has_no_projection_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 0\), empty along axis -1"):
        jax_sae.entmax(jnp.zeros((3, 0)))
    with pytest.raises(ValueError, match="axis is 2 for scores of shape"):
        jax_sae.entmax(jnp.zeros((3, 4)), axis=2)
    for alpha in (1, 1.0, 0.5, np.float32(-2)):
        with pytest.raises(ValueError, match=r"alpha is .*; expected a number above 1"):
            jax_sae.entmax(jnp.zeros(3), alpha)
    with pytest.raises(ValueError, match=r"alpha has shape \(2,\); expected one number"):
        jax_sae.entmax(jnp.zeros((2, 3)), jnp.array([1.5, 2.0]))


def test_a_traced_alpha_that_is_not_above_1_gives_nan():
    for alpha in (1.0, 0.5, np.nan):
        assert np.isnan(entmax(jnp.array([0.0, 1.0]), jnp.float32(alpha))).all()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_the_jacobian_is_the_closed_form_in_both_modes(alpha, scale):
    with jax.enable_x64(True):
        z = scores(1, 20, scale)[0].astype(np.float64)
        reverse, forward = (np.asarray(jacobian(z, alpha)) for jacobian in (by_rows_reverse, by_rows_forward))
    expected = entmax_jacobian(entmax_rows(z[None], alpha)[0], alpha)
    np.testing.assert_allclose(reverse, expected, atol=1e-9 * np.abs(expected).max() + 1e-12)
    np.testing.assert_allclose(forward, reverse, atol=1e-12 * np.abs(expected).max() + 1e-14)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_derivatives_by_scores_and_by_alpha_equal_finite_differences(alpha):
    with jax.enable_x64(True):
        z, direction = (np.random.default_rng(seed).standard_normal((4, 12)) * 0.4 for seed in (2, 1))
        by_z = jax.jvp(lambda z: entmax(z, alpha), (z,), (direction,))[1]
        by_alpha = by_alpha_forward(z, alpha)
        np.testing.assert_allclose(by_alpha_reverse(z, alpha), by_alpha, atol=1e-12)
    step = 1e-6
    p = entmax_rows(z, alpha)
    assert p[p > 0].min() > 1e-4, "no entry may cross the edge of the support"
    by_z_numeric = (entmax_rows(z + step * direction, alpha) - entmax_rows(z - step * direction, alpha)) / (2 * step)
    by_alpha_numeric = (entmax_rows(z, alpha + step) - entmax_rows(z, alpha - step)) / (2 * step)
    assert np.abs(by_z_numeric).max() > 0.01 and np.abs(by_alpha_numeric).max() > 0.01
    np.testing.assert_allclose(by_z, by_z_numeric, atol=1e-7)
    np.testing.assert_allclose(by_alpha, by_alpha_numeric, atol=1e-7)


def test_second_derivatives_equal_finite_differences():
    with jax.enable_x64(True):
        z, weights = np.random.default_rng(2).standard_normal((2, 8)) * 0.4
        loss = lambda at: jnp.sum(weights * jax_sae.entmax(at[:-1], at[-1]) ** 2)
        gradient, hessians = jax.jit(jax.grad(loss)), [jax.jit(h(loss)) for h in (jax.hessian, twice_reverse)]
        step = 1e-6
        for alpha in (1.25, 1.5, 2.5):
            at = jnp.append(jnp.asarray(z), alpha)
            numeric = np.array([(gradient(at + step * e) - gradient(at - step * e)) / (2 * step) for e in np.eye(9)])
            assert np.abs(numeric[:-1, :-1]).max() > 0.01 and np.abs(numeric[-1]).max() > 0.01
            for hessian in hessians:
                np.testing.assert_allclose(hessian(at), numeric, atol=1e-7)


def twice_reverse(loss):
    return jax.jacrev(jax.jacrev(loss))


@pytest.mark.parametrize("transform", ["jit", "vmap", "scan", "checkpoint", "vmap over alpha"])
def test_reverse_mode_under(transform):
    z, g, alphas = scores(6, 30, 0.3), scores(6, 30, seed=1), np.linspace(1.2, 1.9, 6, dtype=np.float32)
    if transform != "vmap over alpha":
        alphas[:] = 1.4
    loss = lambda z, g, alpha=1.4: jnp.sum(jax_sae.entmax(z, alpha) * g)
    gradient = {
        "jit": jax.grad(loss),
        "vmap": jax.vmap(jax.grad(loss)),
        "scan": jax.grad(lambda z, g: jax.lax.scan(lambda total, x: (total + loss(*x), None), 0.0, (z, g))[0]),
        "checkpoint": jax.grad(
            lambda z, g: jnp.sum(jax.checkpoint(functools.partial(jax_sae.entmax, alpha=1.4))(z) * g)
        ),
        "vmap over alpha": lambda z, g: jax.vmap(jax.grad(loss))(z, g, jnp.asarray(alphas)),
    }[transform]
    expected = [
        entmax_jacobian(entmax_rows(row[None], alpha)[0], alpha) @ v
        for row, v, alpha in zip(z, g, alphas.astype(np.float64), strict=True)
    ]
    np.testing.assert_allclose(jax.jit(gradient)(z, g), expected, atol=2e-5)


def test_an_alpha_on_each_side_of_2_in_one_vmap():
    z, alphas = scores(4, 30), np.array([1.5, 2.0, 2.5, 3.0], np.float32)
    got = jax.jit(jax.vmap(jax_sae.entmax))(z, alphas)
    for row, alpha in enumerate(alphas):
        np.testing.assert_allclose(got[row], entmax_rows(z[row][None], alpha)[0], atol=tolerance(alpha))


def test_the_derivative_of_an_entry_outside_is_0():
    for row in ([3.0, 0.0, -np.inf], [2.0, 0.0, -1.0]):  # the second has an entry at the threshold
        np.testing.assert_array_equal(by_rows_reverse(jnp.array(row), 1.5), np.zeros((3, 3)))


def test_float32_derivatives_by_alpha_of_wide_rows():
    z = scores(3, 2000, 0.5)
    for alpha in np.array([1.1, 1.5, 1.9], np.float32):
        exact, step = float(alpha), 1e-6
        numeric = (entmax_rows(z, exact + step) - entmax_rows(z, exact - step)) / (2 * step)
        np.testing.assert_allclose(by_alpha_forward(z, alpha), numeric, atol=2e-4 * np.abs(numeric).max())
