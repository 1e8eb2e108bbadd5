"""The dense product of rows and keys, and what it is rounded to."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_sae.ops import score_products

KEYS = jax.random.normal(jax.random.key(0), (37, 24))
QUERY = 3 * jax.random.normal(jax.random.key(1), (5, 24))


def in_float64(query, keys, dtype):
    query, keys = (np.asarray(a).astype(dtype).astype(np.float64) for a in (query, keys))
    return query @ keys.T


@pytest.mark.parametrize(
    ("name", "dtype"), [("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16), ("auto", np.float32)]
)
def test_factors_are_rounded_and_the_sum_is_float32(name, dtype):
    products = jax.jit(score_products, static_argnums=2)(QUERY, KEYS, name)
    assert products.dtype == jnp.float32
    np.testing.assert_allclose(products, in_float64(QUERY, KEYS, dtype), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_not_float32():
    rounded, exact = (in_float64(QUERY, KEYS, dtype) for dtype in (ml_dtypes.bfloat16, np.float32))
    assert np.abs(rounded - exact).max() > 1e-2  # so that the test above can tell them apart


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_derivatives_are_those_of_the_exact_product(name):
    weights = jax.random.normal(jax.random.key(2), (5, 37))
    by_query, by_keys = jax.grad(lambda q, k: jnp.sum(weights * score_products(q, k, name)), argnums=(0, 1))(
        QUERY, KEYS
    )
    w, q, k = (np.asarray(a, np.float64) for a in (weights, QUERY, KEYS))
    np.testing.assert_allclose(by_query, w @ k, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_keys, w.T @ q, rtol=1e-5, atol=1e-5)
    _, tangent = jax.jvp(lambda q: score_products(q, KEYS, name), (QUERY,), (jnp.ones_like(QUERY),))
    np.testing.assert_allclose(tangent, np.ones_like(q) @ k.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("platform", "rounded"), [("cpu", False), ("tpu", True), ("cuda", True)])
def test_auto_rounds_where_there_are_matrix_units(platform, rounded):
    traced = jax.jit(score_products, static_argnums=2).trace(QUERY, KEYS, "auto")
    assert ("bf16" in traced.lower(lowering_platforms=(platform,)).as_text()) == rounded


def test_leading_dimensions_and_vmap():
    expected = score_products(QUERY, KEYS, "bfloat16")
    np.testing.assert_array_equal(score_products(QUERY[None], KEYS, "bfloat16")[0], expected)
    mapped = jax.vmap(lambda row: score_products(row, KEYS, "bfloat16"))(QUERY)
    np.testing.assert_allclose(mapped, expected, rtol=1e-6, atol=1e-6)
