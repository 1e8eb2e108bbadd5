"""sparsemax of rows that are split over eight devices against sparsemax on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_sae import sparsemax, sparsemax_jvp, sparsemax_threshold
from tests.ops.reference import jacobian, scores, sparsemax_rows

IMPLEMENTATIONS = ["xla", "sort"]
COLUMNS, ROWS = P(None, "model"), P(None)


def over_columns(f, inputs, outputs, mesh=None):
    """``f`` on shards of the columns, and its arguments put there."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,)) if mesh is None else mesh
    sharded = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(COLUMNS,) * inputs, out_specs=outputs))
    return lambda *arrays: sharded(*(jax.device_put(x, NamedSharding(mesh, COLUMNS)) for x in arrays))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [8, 64, 16384])
def test_values_and_derivatives_are_those_of_whole_rows(implementation, width):
    z, g = scores(5, width, 0.2), scores(5, width, seed=1)
    z[1] = 0.5  # a tie over all devices
    z[2, : width // 2] = -np.inf  # devices without a finite score
    chosen = {"axis_name": "model", "implementation": implementation}

    def local(z, g):
        p, pullback = jax.vjp(functools.partial(sparsemax, **chosen), z)
        gradient_of_tau = jax.grad(lambda z: jnp.sum(sparsemax_threshold(z, **chosen)[0]))(z)
        return p, pullback(g)[0], sparsemax_jvp(z, g, **chosen)[1], sparsemax_threshold(z, **chosen), gradient_of_tau

    run = over_columns(local, 2, (COLUMNS, COLUMNS, COLUMNS, (ROWS, ROWS), COLUMNS))
    p, gradient, tangent, (tau, count), gradient_of_tau = run(z, g)
    expected, expected_tau, expected_count = sparsemax_rows(z)
    products = np.stack([jacobian(row) @ vector for row, vector in zip(expected, g.astype(float), strict=True)])
    np.testing.assert_allclose(p, expected, atol=3e-7)
    np.testing.assert_allclose(gradient, products, atol=2e-6)
    np.testing.assert_allclose(tangent, products, atol=2e-6)
    np.testing.assert_allclose(tau, expected_tau, atol=1e-6)
    np.testing.assert_array_equal(count, expected_count)
    np.testing.assert_allclose(gradient_of_tau, (expected > 0) / expected_count[:, None], atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_undefined_shard_makes_the_whole_row_nan_and_no_other(implementation):
    z = scores(10, 64)
    z[1, 9], z[2, 63], z[3] = np.nan, np.inf, -np.inf
    p = over_columns(functools.partial(sparsemax, axis_name="model", implementation=implementation), 1, COLUMNS)(z)
    assert np.isnan(p[1:4]).all()
    np.testing.assert_allclose(p[np.array([0, *range(4, 10)])], sparsemax_rows(z[[0, *range(4, 10)]])[0], atol=3e-7)


def test_second_derivatives_pass_through_the_collectives():
    z, weights = jnp.asarray(scores(2, 16, 0.1)), jnp.asarray(scores(2, 16, seed=1))
    slope = lambda z, weights, **kw: jnp.sum(jnp.sin(jax.grad(lambda z: jnp.sum(weights * sparsemax(z, **kw) ** 2))(z)))
    run = over_columns(jax.grad(functools.partial(slope, axis_name="model")), 2, COLUMNS)
    np.testing.assert_allclose(run(z, weights), jax.jit(jax.grad(slope))(z, weights), atol=1e-5)


def test_rows_and_columns_may_both_be_split():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    z, spec = scores(6, 96, 0.2), P("data", "model")
    f = jax.shard_map(functools.partial(sparsemax, axis_name="model"), mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(
        jax.jit(f)(jax.device_put(z, NamedSharding(mesh, spec))), sparsemax_rows(z)[0], atol=3e-7
    )


def test_columns_split_by_the_compiler_give_the_same():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    z, g = scores(5, 4096, 0.1), scores(5, 4096, seed=1)
    put = lambda x: jax.device_put(x, NamedSharding(mesh, COLUMNS))
    p, gradient = jax.jit(lambda z, g: (sparsemax(z), jax.vjp(sparsemax, z)[1](g)[0]))(put(z), put(g))
    expected = sparsemax_rows(z)[0]
    np.testing.assert_allclose(p, expected, atol=3e-7)
    np.testing.assert_allclose(
        gradient, np.stack([jacobian(row) @ v for row, v in zip(expected, g.astype(float), strict=True)]), atol=2e-6
    )


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_inside_a_shard_map_over_some_axes_of_a_mesh_the_others_are_split_by_the_compiler(implementation):
    """Wide enough for what the CPU gathers."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    z, g = scores(8, 4096, 0.2), scores(8, 4096, seed=1)

    def both(z, g):
        p, pullback = jax.vjp(functools.partial(sparsemax, implementation=implementation), z)
        return p, pullback(g)[0]

    sharded = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}))
    p, gradient = sharded(*(jax.device_put(x, NamedSharding(mesh, P("data", "model"))) for x in (z, g)))
    expected, _, _ = sparsemax_rows(z)
    products = np.stack([jacobian(row) @ vector for row, vector in zip(expected, g.astype(float), strict=True)])
    np.testing.assert_allclose(p, expected, atol=3e-7)
    np.testing.assert_allclose(gradient, products, atol=2e-6)


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_rows_of_a_mesh_with_explicit_axes_stay_where_they_are(implementation):
    z = scores(8, 4096, 0.2)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        rows = jax.device_put(z, NamedSharding(mesh, P("data", None)))
        p = jax.jit(functools.partial(sparsemax, implementation=implementation))(rows)
    assert p.sharding.spec == P("data", None)
    np.testing.assert_allclose(p, sparsemax_rows(z)[0], atol=3e-7)
