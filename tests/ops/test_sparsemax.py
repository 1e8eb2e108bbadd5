"""sparsemax against float64 sorting, the reference's recorded numbers, and the closed form of its derivatives."""

import functools
import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_sae import sparsemax, sparsemax_jvp, sparsemax_threshold
from tests.ops.reference import sparsemax_rows

IMPLEMENTATIONS = ["xla", "sort"]
GOLDEN = Path(__file__).parent.parent / "goldens" / "sparsemax_op_public.npz"


def scores(rows, width, scale=1.0, seed=0, offset=0.0):
    return (scale * np.random.default_rng(seed).standard_normal((rows, width)) + offset).astype(np.float32)


def assert_projects(z, implementation, atol=1e-6):
    p, tau, count = sparsemax_rows(z)
    got, (got_tau, got_count) = jax.jit(
        lambda z: (sparsemax(z, implementation=implementation), sparsemax_threshold(z, implementation=implementation))
    )(z)
    got = np.asarray(got)
    np.testing.assert_allclose(got, p, atol=atol)
    np.testing.assert_array_equal(got > 0, p > 0)
    np.testing.assert_array_equal(got_count, count)
    np.testing.assert_allclose(got_tau, tau, rtol=1e-6, atol=atol)
    np.testing.assert_allclose(got.sum(-1), 1, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [1, 2, 129, 5000])
def test_equals_float64_sorting_at_every_scale(implementation, width):
    assert_projects(np.concatenate([scores(16, width, s) for s in (1e-3, 0.01, 0.1, 1.0, 100.0)]), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_large_offset_costs_nothing(implementation):
    assert_projects(scores(16, 700, 1.0) * 2.0**-3 + 1024, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([7.0] * 8, [1 / 8] * 8),
        ([0.0] * 8, [1 / 8] * 8),
        ([1.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]),
        ([1.0, 0.0, -5.0], [1.0, 0.0, 0.0]),
        ([1e30, -1e30, 0.0], [1.0, 0.0, 0.0]),
        ([0.5, -np.inf, 0.5, -np.inf], [0.5, 0.0, 0.5, 0.0]),
        ([-3.0], [1.0]),
        ([-40.0, -40.5, -42.0], [0.75, 0.25, 0.0]),
    ],
)
def test_rows_with_a_known_answer(implementation, row, expected):
    got = sparsemax(jnp.array(row), implementation=implementation)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [4, 3000])
def test_rows_without_a_projection_are_nan_and_leave_others_alone(implementation, width):
    z = scores(6, width)
    z[1, width // 2], z[2, 0], z[3], z[4, :2] = np.nan, np.inf, -np.inf, (np.nan, np.inf)
    z = jnp.asarray(z)
    got = np.asarray(sparsemax(z, implementation=implementation))
    assert np.isnan(got[1:5]).all()
    np.testing.assert_allclose(got[[0, 5]], sparsemax_rows(z[jnp.array([0, 5])])[0], atol=1e-6)
    tau, count = sparsemax_threshold(z, implementation=implementation)
    np.testing.assert_array_equal(np.isnan(tau), np.isnan(got).all(-1))
    np.testing.assert_array_equal(np.asarray(count) == 0, np.isnan(tau))


def test_newton_ends_on_rows_made_to_cycle():
    """Neighbouring floats around the threshold, where the count alone can go back and forth for ever."""
    rng = np.random.default_rng(0)
    steps = rng.integers(-3, 4, (4000, 33))
    z = (rng.choice([0.03, 0.25, 1.0], (4000, 1)) * (1 + steps * 2.0**-23)).astype(np.float32)
    got = np.asarray(sparsemax(jnp.asarray(z)))
    np.testing.assert_allclose(got, sparsemax_rows(z)[0], atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_any_axis_of_any_batch(axis):
    z = jnp.asarray(scores(30, 77).reshape(5, 6, 77))
    moved = np.moveaxis(np.asarray(z), axis, -1)
    expected = np.moveaxis(sparsemax_rows(moved.reshape(-1, moved.shape[-1]))[0].reshape(moved.shape), -1, axis)
    np.testing.assert_allclose(sparsemax(z, axis), expected, atol=1e-6)
    assert sparsemax_threshold(z, axis)[0].shape == tuple(np.delete(z.shape, axis))


def test_where_leaves_entries_out():
    z, keep = scores(6, 40), np.random.default_rng(1).random((6, 40)) > 0.5
    keep[5] = False
    got = np.asarray(sparsemax(jnp.asarray(z), where=jnp.asarray(keep)))
    for row in range(5):
        np.testing.assert_allclose(got[row, keep[row]], sparsemax_rows(z[row, keep[row]][None])[0][0], atol=1e-6)
        assert not got[row, ~keep[row]].any()
    assert np.isnan(got[5]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_projected_in_float32(dtype):
    z = jnp.asarray(scores(8, 300, 0.1), dtype)
    got = sparsemax(z)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, sparsemax(z.astype(jnp.float32)).astype(dtype))
    assert sparsemax_threshold(z)[0].dtype == jnp.float32


def test_float64_stays_float64():
    with jax.enable_x64(True):
        z = jnp.asarray(np.random.default_rng(0).standard_normal((4, 500)) * 0.05)
        for implementation in IMPLEMENTATIONS:
            got = sparsemax(z, implementation=implementation)
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, sparsemax_rows(z)[0], atol=1e-15)


def test_integers_become_float32():
    got = sparsemax(jnp.array([3, 3, 1]))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, [0.5, 0.5, 0])


def test_empty_batches_pass_and_empty_axes_do_not():
    assert sparsemax(jnp.zeros((0, 5))).shape == (0, 5)
    assert sparsemax_threshold(jnp.zeros((3, 0, 5)))[0].shape == (3, 0)
    with pytest.raises(ValueError, match=r"shape \(3, 0\), empty along axis -1"):
        sparsemax(jnp.zeros((3, 0)))
    with pytest.raises(ValueError, match="axis is 2"):
        sparsemax(jnp.zeros((3, 4)), axis=2)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation is 'fast'; expected None or one of xla, sort"):
        sparsemax(jnp.zeros((0, 3)), implementation="fast")


@pytest.mark.parametrize("prefix", ["", "wide_", "wide_small_", "wide_dense_"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_reference(prefix, implementation):
    ties = ("one-hot (second entry exactly at the threshold)", "two-way tie filling", "four-way tie filling")
    names = json.loads(GOLDEN.with_suffix(".json").read_text())["row_names"]
    with np.load(GOLDEN, allow_pickle=False) as g:
        z, p, cotangent, expected = (jnp.asarray(g[prefix + name]) for name in ("z", "p", "g", "vjp"))
    got, pullback = jax.vjp(functools.partial(sparsemax, implementation=implementation), z)
    np.testing.assert_allclose(got, p, atol=2e-6)
    # In an exact tie at the threshold the reference passes the gradient through an entry with p = 0; here it gets 0.
    tied = np.array([not prefix and names[i].startswith(ties) for i in range(len(z))])
    np.testing.assert_allclose(np.asarray(pullback(cotangent)[0])[~tied], np.asarray(expected)[~tied], atol=4e-6)


def jacobian(p):
    """diag(s) - s s^T / |S|, in float64."""
    s = (np.asarray(p) > 0).astype(np.float64)
    return np.diag(s) - np.outer(s, s) / s.sum()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_jacobian_is_the_closed_form_in_both_modes(implementation):
    z = jnp.asarray(scores(1, 30, 0.5)[0])
    f = functools.partial(sparsemax, implementation=implementation)
    np.testing.assert_allclose(jax.jacrev(f)(z), jacobian(f(z)), atol=1e-6)
    columns = jax.vmap(lambda e: sparsemax_jvp(z, e, implementation=implementation)[1])(jnp.eye(30))
    np.testing.assert_allclose(columns, jacobian(f(z)), atol=1e-6)


def test_an_entry_tied_with_the_threshold_has_derivative_0():
    z = jnp.array([1.0, 0.0, -1.0])
    np.testing.assert_array_equal(jax.jacrev(sparsemax)(z), np.zeros((3, 3)))


def test_second_derivatives_equal_finite_differences():
    with jax.enable_x64(True):
        z = jnp.asarray(np.random.default_rng(3).standard_normal(12) * 0.4)
        weights = jnp.asarray(np.random.default_rng(4).standard_normal(12))
        loss = lambda z: jnp.sum(weights * sparsemax(z) ** 3)
        step = 1e-6
        gradient = jax.jit(jax.grad(loss))
        numeric = np.stack([(gradient(z + step * e) - gradient(z - step * e)) / (2 * step) for e in jnp.eye(12)])
        for hessian in (jax.jacrev(jax.jacrev(loss)), jax.jacfwd(jax.jacrev(loss))):
            np.testing.assert_allclose(hessian(z), numeric, atol=1e-8)


def test_transformations_compose():
    z, g = jnp.asarray(scores(6, 90, 0.3)), jnp.asarray(scores(6, 90, seed=1))
    expected = np.stack([jacobian(p) @ v for p, v in zip(sparsemax(z), np.asarray(g, np.float64), strict=True)])
    row_grad = jax.grad(lambda z, g: jnp.sum(sparsemax(z) * g))
    scanned = jax.grad(lambda z: jax.lax.scan(lambda c, x: (c + jnp.sum(sparsemax(x[0]) * x[1]), None), 0.0, (z, g))[0])
    np.testing.assert_allclose(jax.vmap(row_grad)(z, g), expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(scanned)(z), expected, atol=1e-6)
    p, tangent = jax.jit(sparsemax_jvp)(z, g)
    np.testing.assert_array_equal(p, sparsemax(z))
    np.testing.assert_allclose(tangent, expected, atol=1e-6)
    remat = jax.grad(lambda z: jnp.sum(jax.checkpoint(sparsemax)(z) * g))
    np.testing.assert_allclose(remat(z), expected, atol=1e-6)


def test_reverse_mode_keeps_p_and_nothing_else():
    z = jnp.asarray(scores(4, 64))
    p, pullback = jax.jit(lambda z: jax.vjp(sparsemax, z))(z)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size > 1]
    assert [leaf.shape for leaf in kept] == [p.shape]
    np.testing.assert_array_equal(kept[0], p)


def test_the_derivative_of_the_threshold_is_the_mean_over_the_support():
    z = jnp.asarray(scores(5, 40, 0.5))
    support = np.asarray(sparsemax(z)) > 0
    gradient = jax.grad(lambda z: jnp.sum(sparsemax_threshold(z)[0]))(z)
    np.testing.assert_allclose(gradient, support / support.sum(-1, keepdims=True), atol=1e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [64, 16384])
def test_sharded_over_eight_devices_it_is_the_same(implementation, width):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    z, g = jnp.asarray(scores(5, width, 0.2)), jnp.asarray(scores(5, width, seed=1))

    def local(z, g):
        f = functools.partial(sparsemax, axis_name="model", implementation=implementation)
        p, pullback = jax.vjp(f, z)
        return p, pullback(g)[0], sparsemax_threshold(z, axis_name="model", implementation=implementation)

    columns, rows = P(None, "model"), P(None)
    sharded = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(columns, columns), out_specs=(columns, columns, (rows, rows)))
    )
    put = lambda x: jax.device_put(x, NamedSharding(mesh, columns))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p, gradient, (tau, count) = sharded(put(z), put(g))
    np.testing.assert_allclose(p, sparsemax(z), atol=1e-6)
    np.testing.assert_allclose(gradient, jax.vjp(sparsemax, z)[1](g)[0], atol=1e-6)
    np.testing.assert_allclose(tau, sparsemax_threshold(z)[0], atol=1e-6)
    np.testing.assert_array_equal(count, sparsemax_threshold(z)[1])
