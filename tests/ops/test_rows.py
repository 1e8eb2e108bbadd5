"""Products over few rows, in blocks, against the dense products; and where the used places are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sae import SparseCodes, sparse_decode
from jax_sae.ops.compaction import compact
from jax_sae.ops.rows import accumulate_rows, combine_rows, dot_rows, plan_blocks

B, T, K, N, D = 7, 2, 70, 200, 5


def places(seed=0):
    """Rows with 0 to K places in use, the first ones."""
    rng = np.random.default_rng(seed)
    count = np.array([0, 1, 31, 32, 33, K, 5], np.int32)
    indices = np.stack([rng.permutation(N)[:K] for _ in range(B)]).astype(np.int32)
    used = np.arange(K)[None] < count[:, None]
    return np.where(used, indices, N), used, count


@pytest.fixture(params=["cpu", "default"])
def form(request, run_as):
    """Both forms of the work, whatever platform the tests run on."""
    run_as(request.param)


@pytest.mark.parametrize("room", [None, 9])
def test_products_over_blocks_equal_dense_products(form, room):
    indices, used, count = places()
    rng = np.random.default_rng(1)
    weights = np.where(used[:, None], rng.standard_normal((B, T, K)), 0).astype(np.float32)
    table, rows = (rng.standard_normal(shape).astype(np.float32) for shape in ((N, D), (B, T, D)))
    dense = np.zeros((B, T, N + 1))
    for b in range(B):
        dense[b][:, indices[b]] += weights[b]
    blocks, needed = plan_blocks(jnp.asarray(indices), jnp.asarray(count), room)
    assert needed == 0 + 1 + 1 + 1 + 2 + 3 + 1
    np.testing.assert_allclose(combine_rows(weights, blocks, table), dense[..., :N] @ table, atol=1e-5)
    accumulated = np.einsum("btn,btd->nd", dense[..., :N], rows)
    np.testing.assert_allclose(accumulate_rows(weights, blocks, rows, N), accumulated, atol=1e-5)
    products = dot_rows(rows, blocks, table, K)
    expected = np.einsum("btd,bkd->btk", rows, table[np.minimum(indices, N - 1)])
    assert products.shape == (B, T, K)
    np.testing.assert_allclose(np.where(used[:, None], products, 0), np.where(used[:, None], expected, 0), atol=1e-5)


def test_a_plan_without_room_says_how_much_it_needs():
    indices, _, count = places()
    blocks, needed = plan_blocks(jnp.asarray(indices), jnp.asarray(count), 4)
    assert needed == 9 and blocks.indices.shape == (4, 32)


@pytest.mark.parametrize("width", [1, 31, 32, 33, 1000, 4097])
def test_compaction_finds_every_true_entry_once(width):
    mask = np.random.default_rng(width).random((9, width)) < 0.1
    mask[0], mask[1] = True, False
    k = 40
    indices, count = map(np.asarray, compact(jnp.asarray(mask), k))
    np.testing.assert_array_equal(count, mask.sum(-1))
    for row, found in zip(mask, indices, strict=True):
        held = found[found < width]
        np.testing.assert_array_equal(found[len(held) :], width)
        assert len(set(held)) == len(held) == min(k, row.sum()) and row[held].all()


def test_sparse_decode_under_vmap_takes_its_gradients_along():
    indices, used, count = places()
    values = jnp.asarray(np.where(used, 1.0, 0), jnp.float32)
    tables = jax.random.normal(jax.random.key(0), (3, N, D))
    codes = SparseCodes(values, jnp.asarray(indices), jnp.asarray(count))
    loss = lambda table: jnp.sum(jnp.sin(sparse_decode(codes, table)))
    mapped = jax.vmap(jax.grad(loss))(tables)
    for table, found in zip(tables, mapped, strict=True):
        np.testing.assert_allclose(found, jax.grad(loss)(table), atol=1e-6)
