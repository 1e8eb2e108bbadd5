"""Metrics keep float32 whatever the program around them is satisfied with."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sae.metrics import (
    AlignmentSums,
    MonosemanticitySums,
    OrthogonalitySums,
    ReconstructionSums,
    SparsitySums,
)
from tests.metrics.batching import jitted

A, B = jax.random.normal(jax.random.key(0), (2, 32, 8))


@pytest.mark.parametrize(
    ("of_batch", "arguments", "matmuls"),
    [
        (AlignmentSums.of_batch, (A, B), 2),
        (OrthogonalitySums.of_batch, (A,), 2),
        (MonosemanticitySums.of_batch, (A, B), 1),
        (ReconstructionSums.of_batch, (A, B), 0),
    ],
)
def test_every_matmul_asks_for_the_highest_precision(of_batch, arguments, matmuls):
    with jax.default_matmul_precision("bfloat16"):
        text = jax.jit(of_batch).lower(*arguments).as_text()
    found = re.findall(r"dot_general.*", text)
    assert len(found) == matmuls
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in found)


@pytest.mark.parametrize(
    ("of_batch", "count"),
    [
        (AlignmentSums.of_batch, 2),
        (OrthogonalitySums.of_batch, 1),
        (MonosemanticitySums.of_batch, 2),
        (ReconstructionSums.of_batch, 2),
        (SparsitySums.of_batch, 1),
    ],
)
def test_half_precision_rows_are_summed_in_float32(of_batch, count):
    rows = [rows.astype(jnp.bfloat16) for rows in (A, B)[:count]]
    of_batch = jitted(of_batch)
    got = of_batch(*rows)
    expected = of_batch(*(half.astype(jnp.float32) for half in rows))
    for value, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert value.dtype == wanted.dtype
        np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-6)
