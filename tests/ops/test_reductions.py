"""A reduction on its own is the reduction."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_sae.ops import reduce_apart

ROWS = jax.random.normal(jax.random.key(0), (5, 7))


def sums(a, b):
    return {"rows": jnp.sum(a * b, axis=-1), "all": jnp.max(a)}


def test_gives_what_the_function_gives_under_jit_and_vmap():
    expected = {"rows": np.sum(np.square(ROWS), axis=-1), "all": np.max(ROWS)}
    found = jax.jit(lambda step, rows: reduce_apart(sums, step >= 0, rows, rows))(jnp.int32(0), ROWS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    mapped = jax.vmap(lambda row: reduce_apart(sums, jnp.bool_(True), row[None], row[None]))(ROWS)
    np.testing.assert_allclose(mapped["rows"][:, 0], expected["rows"], rtol=1e-6)


def test_is_differentiable():
    gradient = jax.grad(lambda rows: jnp.sum(reduce_apart(sums, jnp.bool_(True), rows, rows)["rows"]))(ROWS)
    np.testing.assert_allclose(gradient, 2 * ROWS, rtol=1e-6)
