"""Places of True entries against NumPy, by each of the two ways to find them."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_sae.ops import compaction


def masks(width, seed=0):
    """Rows from empty to full, and one with its True entries at both ends."""
    rng = np.random.default_rng(seed)
    rows = [rng.random(width) < share for share in (0, 0.01, 0.1, 0.5, 1)]
    return np.stack([*rows, np.isin(np.arange(width), (0, width - 1))])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(("width", "k"), [(1, 1), (1, 5), (31, 40), (32, 8), (1000, 64), (1000, 200), (5000, 600)])
def test_every_true_column_has_a_place_and_none_is_there_twice(platform, width, k, run_as):
    run_as(platform)
    mask = masks(width)
    indices, count = compaction.compact(jnp.asarray(mask), k=k)
    assert indices.shape == (len(mask), k) and indices.dtype == count.dtype == jnp.int32
    np.testing.assert_array_equal(count, mask.sum(-1))
    for row, found in zip(mask, np.asarray(indices), strict=True):
        used = min(k, row.sum())
        assert (found[used:] == width).all()
        assert len(set(found[:used])) == used and row[found[:used]].all()


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 8, 100])
def test_the_first_entry_above_a_value_is_that_of_numpy(width):
    ascending = np.sort(np.random.default_rng(width).integers(0, 9, (20, width)), axis=-1).astype(np.int32)
    values = np.arange(10, dtype=np.int32)
    expected = np.stack([np.searchsorted(row, values, side="right") for row in ascending])
    np.testing.assert_array_equal(compaction._first_above(jnp.asarray(ascending), jnp.asarray(values)), expected)
