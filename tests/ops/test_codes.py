"""Sparse codes hold what dense activations hold, and say so when they do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sae import SparseCodes, sparse_decode, to_codes

M, D = 30, 6


def dense(rows=12, seed=0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random((rows, M)) < 0.2, rng.standard_normal((rows, M)), 0).astype(np.float32)


def test_codes_list_the_nonzero_entries_in_order():
    a = dense()
    codes = to_codes(jnp.asarray(a), 16)
    for row, values, indices, count in zip(a, codes.values, codes.indices, codes.count, strict=True):
        active = np.flatnonzero(row)
        assert count == len(active)
        np.testing.assert_array_equal(indices[:count], active)
        np.testing.assert_array_equal(values[:count], row[active])
        assert (np.asarray(indices)[count:] == M).all() and not np.asarray(values)[count:].any()


def test_codes_and_dense_are_inverse_where_nothing_overflows():
    a = jnp.asarray(dense().reshape(3, 4, M))
    np.testing.assert_array_equal(to_codes(a, 20).to_dense(M), a)


def test_a_row_that_overflows_says_so_and_keeps_as_many_as_fit():
    a = jnp.asarray(dense())
    codes = to_codes(a, 3)
    np.testing.assert_array_equal(codes.count, (np.asarray(a) != 0).sum(-1))
    assert (codes.count > 3).any()
    for row, indices in zip(np.asarray(a), codes.indices, strict=True):
        held = np.asarray(indices)[np.asarray(indices) < M]
        assert len(held) == len(set(held)) == min(3, (row != 0).sum()) and row[held].all()


def test_sparse_decode_and_its_gradients_equal_the_dense_product():
    a = jnp.asarray(dense())
    dictionary = jax.random.normal(jax.random.key(0), (M, D))
    codes = to_codes(a, 20)
    np.testing.assert_allclose(sparse_decode(codes, dictionary), a @ dictionary, atol=1e-5)
    loss = lambda values, dictionary: jnp.sum(
        jnp.sin(sparse_decode(SparseCodes(values, codes.indices, codes.count), dictionary))
    )
    by_values, by_dictionary = jax.grad(loss, argnums=(0, 1))(codes.values, dictionary)
    dense_loss = lambda a, dictionary: jnp.sum(jnp.sin(a @ dictionary))
    dense_by_a, dense_by_dictionary = jax.grad(dense_loss, argnums=(0, 1))(a, dictionary)
    np.testing.assert_allclose(by_dictionary, dense_by_dictionary, atol=1e-5)
    spread = SparseCodes(by_values, codes.indices, codes.count).to_dense(M)
    np.testing.assert_allclose(spread, np.where(np.asarray(a) != 0, dense_by_a, 0), atol=1e-5)


def test_codes_are_a_pytree_under_jit_and_vmap():
    a = jnp.asarray(dense())
    mapped = jax.jit(jax.vmap(lambda row: to_codes(row, 8)))(a)
    together = to_codes(a, 8)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), mapped, together))


def test_no_places_are_refused():
    with pytest.raises(ValueError, match="k is 0"):
        to_codes(jnp.zeros(4), 0)
