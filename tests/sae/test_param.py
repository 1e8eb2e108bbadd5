"""A parameter that is stored as its transpose is the matrix to whoever indexes it."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_sae.sae.param import StoredTransposed

MATRIX = np.arange(12.0).reshape(3, 4)  # [d, M]


def make():
    return StoredTransposed.of_rows(jnp.asarray(MATRIX.T))


def test_reading_a_part_reads_the_matrix():
    np.testing.assert_array_equal(make()[...], MATRIX)
    np.testing.assert_array_equal(make()[1], MATRIX[1])
    np.testing.assert_array_equal(make()[:, 2], MATRIX[:, 2])
    assert float(make()[2, 0]) == MATRIX[2, 0] and make()[...].shape == (3, 4)


def test_writing_a_part_writes_the_matrix():
    parameter, expected = make(), MATRIX.copy()
    parameter[0, 1:3], expected[0, 1:3] = jnp.array([-1.0, -2.0]), [-1, -2]
    np.testing.assert_array_equal(parameter[...], expected)
    parameter[...] = jnp.asarray(2 * MATRIX)
    np.testing.assert_array_equal(parameter[...], 2 * MATRIX)


def test_its_leaf_is_stored_by_rows():
    (leaf,) = jax.tree.leaves(make())
    np.testing.assert_array_equal(leaf, MATRIX.T)
