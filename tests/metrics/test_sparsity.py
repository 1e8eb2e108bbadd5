"""Zeros, active concepts and dead ones against NumPy, however rows are batched."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jax_sae.metrics import SparsitySums, on_host
from tests.metrics.batching import sharded, streamed

N, M = 320, 40


@functools.cache
def activations(kind):
    rng = np.random.default_rng(0)
    a = np.where(rng.random((N, M)) < 0.1, np.exp(rng.standard_normal((N, M))), 0)
    if kind == "some dead, some on one row, some everywhere, some negative":
        a[:, 5], a[:, 6], a[17, 6], a[:, 7], a[:, 8] = 0, 0, 1e-30, 1e-30, -a[:, 8]
        a[::3] = -0.0
    if kind == "all zero":
        a[:] = 0
    if kind == "all active":
        a[:] = 1
    return a.astype(np.float32)


KINDS = ["sparse", "some dead, some on one row, some everywhere, some negative", "all zero", "all active"]


def definition(a):
    return {
        "l0": (a == 0).mean(-1).mean(),
        "active": (a != 0).sum(-1).mean(),
        "dead_fraction": sum(not column.any() for column in a.T) / a.shape[-1],
    }


@pytest.mark.parametrize("size", [1, 7, 64, N])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition_in_any_batch_size(kind, size):
    a = activations(kind)
    sums = streamed(SparsitySums.of_batch, a, size=size)
    np.testing.assert_array_equal(sums.firing, (a != 0).sum(0))
    assert sums.compute() == pytest.approx(definition(a), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_over_eight_devices_equals_the_definition(kind):
    a = activations(kind)
    assert sharded(SparsitySums.of_batch, a).compute() == pytest.approx(definition(a), rel=1e-12)


def test_sparsity_counts_exact_zeros():
    a = np.where(np.random.default_rng(0).random((90, 40)) < 0.1, 1e-30, 0).astype(np.float32)
    a[:, 5], a[3, 6] = 0, -2.0
    sums = streamed(SparsitySums.of_batch, a, size=20)
    np.testing.assert_array_equal(sums.firing, (a != 0).sum(0))
    assert sums.compute() == pytest.approx(definition(a), rel=1e-12)


@pytest.mark.parametrize("where", ["device", "host"])
def test_the_count_of_a_dense_batch_passes_what_int32_holds(where):
    rows, concepts = 2**20, 49_152
    sums = SparsitySums(jnp.int32(rows), jnp.full(concepts, rows, jnp.int32))
    sums = on_host(sums) if where == "host" else sums
    assert sums.compute() == {"l0": 0.0, "active": concepts, "dead_fraction": 0.0}


def test_more_rows_than_int32_counts_add_up_exactly():
    part = on_host(SparsitySums(jnp.int32(2**30), jnp.array([2**30, 2**30 - 1, 0], jnp.int32)))
    total = functools.reduce(SparsitySums.merge, [part] * 1000)
    assert total.rows == 1000 * 2**30
    np.testing.assert_array_equal(total.firing, [1000 * 2**30, 1000 * (2**30 - 1), 0])
    assert total.compute()["dead_fraction"] == pytest.approx(1 / 3, rel=1e-15)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.bool_])
def test_counts_are_integers_whatever_the_activations_are(dtype):
    a = jnp.ones((300, 2), dtype)  # bfloat16 cannot count to 300
    sums = SparsitySums.of_batch(a)
    assert sums.firing.dtype == sums.rows.dtype == jnp.int32
    np.testing.assert_array_equal(sums.firing, [300, 300])
