"""The prototype of the fused kernel gives what the two parts give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.fused_selection import apart, fused


def test_the_fused_kernel_is_the_product_and_sparsemax():
    query, keys = (
        0.3 * jax.random.normal(jax.random.key(seed), (rows, 64), jnp.bfloat16) for seed, rows in ((0, 32), (1, 2048))
    )
    p = fused(query, keys, rows=16, columns=256, interpret=True)
    np.testing.assert_allclose(p, apart(query, keys), atol=1e-6)
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-6)
    assert 1 < (p > 0).sum(-1).mean() < 50


def test_rows_that_do_not_fill_a_block_are_refused():
    rows, keys = jnp.zeros((24, 64), jnp.bfloat16), jnp.zeros((2048, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="24 rows and 2048 keys; expected multiples of 16 and 256"):
        fused(rows, keys, rows=16, columns=256, interpret=True)
