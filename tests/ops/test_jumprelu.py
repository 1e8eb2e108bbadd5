"""JumpReLU and the step: values, and the pseudo-derivatives that stand in for those by the threshold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sae import jump_relu, step_above

WIDTH = 0.5  # exact in float32, as are the scores and thresholds below

# Score, threshold, whether the score is above it, whether it is nearer than half the bandwidth.
CASES = [
    (2.0, 0.5, True, False),
    (0.5, 0.5, False, True),
    (0.625, 0.5, True, True),
    (0.375, 0.5, False, True),
    (0.75, 0.5, True, False),  # at the edge of the window
    (0.25, 0.5, False, False),
    (0.0, 0.125, False, True),
    (-1.0, 0.5, False, False),
    (-0.25, -0.375, True, True),  # a threshold below zero passes negative scores
    (0.1, 0.0, True, True),
]
Z, THRESHOLD = (jnp.array([case[i] for case in CASES], jnp.float32) for i in (0, 1))
ABOVE, NEAR = (np.array([case[i] for case in CASES]) for i in (2, 3))


def diagonals(function, argument):
    """Of the Jacobians in reverse and in forward mode; nothing may be beside the diagonal."""
    jacobians = [np.asarray(mode(function, argument)(Z, THRESHOLD, WIDTH)) for mode in (jax.jacrev, jax.jacfwd)]
    for jacobian in jacobians:
        np.testing.assert_array_equal(jacobian, np.diag(np.diag(jacobian)))
    np.testing.assert_array_equal(*jacobians)
    return np.diag(jacobians[0])


def test_values():
    np.testing.assert_array_equal(jump_relu(Z, THRESHOLD, WIDTH), np.where(ABOVE, Z, 0))
    np.testing.assert_array_equal(step_above(Z, THRESHOLD, WIDTH), ABOVE.astype(np.float32))


def test_derivatives_of_jump_relu():
    np.testing.assert_array_equal(diagonals(jump_relu, 0), ABOVE)
    np.testing.assert_array_equal(diagonals(jump_relu, 1), -np.asarray(THRESHOLD) / WIDTH * NEAR)


def test_derivatives_of_the_step():
    np.testing.assert_array_equal(diagonals(step_above, 0), np.zeros(len(CASES)))
    np.testing.assert_array_equal(diagonals(step_above, 1), NEAR / -WIDTH)


def test_the_estimate_is_the_derivative_of_the_mean_over_scores():
    """d/dt of E[jump_relu(z, t)] is -t p(t) and of E[1(z > t)] is -p(t), here for scores of density p = N(0, 1)."""
    z = np.random.default_rng(0).standard_normal(2_000_000).astype(np.float32)
    t = 0.7
    density = np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi)
    slope = lambda function: jax.grad(lambda t: jnp.mean(function(z, t[None], 0.1)))(jnp.float32(t))
    assert float(slope(jump_relu)) == pytest.approx(-t * density, rel=0.01)
    assert float(slope(step_above)) == pytest.approx(-density, rel=0.01)


@pytest.mark.parametrize("function", [jump_relu, step_above])
def test_a_threshold_for_each_concept_gathers_the_rows(function):
    z = jnp.array([[0.625, 2.0], [0.375, 0.25], [0.5, 0.125]])
    threshold = jnp.array([0.5, 0.25])
    weight = threshold if function is jump_relu else 1.0
    gradient = jax.jit(jax.grad(lambda t: jnp.sum(function(z, t[None, :], WIDTH))))(threshold)
    np.testing.assert_array_equal(gradient, -np.array([3, 2]) / WIDTH * weight)


@pytest.mark.parametrize("function", [jump_relu, step_above])
@pytest.mark.parametrize("transform", ["vmap", "scan"])
def test_under(function, transform):
    loss = lambda z, threshold: jnp.sum(function(z, threshold, WIDTH) ** 2)
    expected = jax.grad(loss, (0, 1))(Z, THRESHOLD)
    if transform == "vmap":
        got = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(Z, THRESHOLD)
    else:
        total = lambda z, t: jax.lax.scan(lambda sums, pair: (sums + loss(*pair), None), 0.0, (z, t))[0]
        got = jax.jit(jax.grad(total, (0, 1)))(Z, THRESHOLD)
    for gradient, wanted in zip(got, expected, strict=True):
        np.testing.assert_array_equal(gradient, wanted)


def test_second_derivatives_are_those_of_the_estimate():
    """d/dt of -t / width * 1[near], and of 1[above] by z."""
    by_threshold = lambda t: jax.grad(jump_relu, 1)(jnp.float32(0.625), t, WIDTH)
    assert jax.grad(by_threshold)(jnp.float32(0.5)) == -1 / WIDTH
    assert jax.grad(jax.grad(jump_relu))(jnp.float32(2.0), jnp.float32(0.5), WIDTH) == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays(dtype):
    z, threshold = Z.astype(dtype), THRESHOLD.astype(dtype)
    for function in (jump_relu, step_above):
        value, (by_z, by_threshold) = jax.value_and_grad(
            lambda z, t, function=function: jnp.sum(function(z, t, WIDTH)), (0, 1)
        )(z, threshold)
        assert value.dtype == by_z.dtype == by_threshold.dtype == dtype
    np.testing.assert_array_equal(by_threshold, NEAR / -WIDTH)
