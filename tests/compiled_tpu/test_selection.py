"""Selection without sorts and without scatters, as the real TPU compiler has it."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.tpu_compiler import compile_for
from jax_sae import top_k_mask
from jax_sae.ops.compaction import compact

SCORES = jax.ShapeDtypeStruct((1024, 49152), jnp.float32)


def assert_sweeps(program):
    assert program.count("sort") == program.count("scatter") == 0


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("k", [1, 32, 128, 200, 512])
def test_the_k_largest_are_found_in_one_read_of_the_scores(chip, k):
    """By the TPU's own top-k, which reads the scores and keeps no copy of them; then a comparison makes the mask."""
    program = compile_for(chip, lambda z: top_k_mask(z, k), SCORES)
    assert_sweeps(program)
    assert program.readers(0).count("custom-call") == 1 and len(program.readers(0)) == 2
    assert program.memory.temp_size_in_bytes < SCORES.size * 4 / 20


def test_more_than_a_tpu_has_a_top_k_for_are_found_by_halving():
    program = compile_for("v5e", lambda z: top_k_mask(z, 600), SCORES)
    assert_sweeps(program)
    assert program.count("while") >= 2


@pytest.mark.parametrize("k", [64, 512, 1024])
def test_places_are_found_without_a_sort(k):
    mask = jax.ShapeDtypeStruct(SCORES.shape, bool)
    assert_sweeps(compile_for("v5e", lambda mask: compact(mask, k), mask))
