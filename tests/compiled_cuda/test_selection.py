"""Selection, sparse products and training steps as XLA compiles them for GPUs: how often scores go through memory."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks.compiled_gpu import step
from benchmarks.gpu_compiler import CHIPS, compile_for
from benchmarks.shapes import Shape
from jax_sae import top_k_mask
from jax_sae.ops.compaction import compact
from jax_sae.ops.rows import accumulate_rows, plan_blocks

B, M, D, PLACES = 1024, 49_152, 768, 64
SCORES = jax.ShapeDtypeStruct((B, M), jnp.float32)


@pytest.fixture(params=CHIPS)
def compiled(request):
    return functools.partial(compile_for, request.param)


def sorted_widths(program):
    """The lengths of the rows that the program sorts."""
    return [int(width) for width in re.findall(r"\[[\d,]*?(\d+)\]\S*(?:, [^()]*)?\)? sort\(", program.text)]


@pytest.mark.parametrize("k", [1, 384])
def test_the_k_largest_take_three_reads_of_the_scores(compiled, k):
    """Maxima, places of what reaches their k-th, and the mask; sorted are only maxima and gathered scores.

    Whole rows are gone through only where more than are gathered reach it.
    """
    program = compiled(lambda z: top_k_mask(z, k), SCORES)
    widths = sorted_widths(program)
    assert len(widths) == program.count("sort") == 2 and max(widths) <= 2 * k + 512
    assert program.count("scatter") == 0 and "TopK" not in program.text
    maxima, places, whole_rows, mask = ("fusion", 1, 0), ("fusion", 1, 0), ("conditional", 1, 0), ("fusion", 1, 1)
    assert program.passes(SCORES.size) == [maxima, places, whole_rows, mask]


def test_more_than_maxima_can_bound_are_found_by_halving(compiled):
    program = compiled(lambda z: top_k_mask(z, 600), SCORES)
    assert program.count("sort") == program.count("scatter") == 0
    assert program.count("while") >= 2


def test_places_take_one_read(compiled):
    program = compiled(lambda z: compact(z > 0, PLACES), SCORES)
    assert program.passes(SCORES.size) == [("fusion", 1, 0)]
    assert program.count("sort") == program.count("scatter") == 0
    assert program.memory.temp_size_in_bytes < SCORES.size * 4 / 10


def test_rows_are_added_up_without_being_written_first(compiled):
    def add_up(weights, indices, count, rows):
        return accumulate_rows(weights, plan_blocks(indices, count)[0], rows, M)

    number, whole = (functools.partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.float32, jnp.int32))
    program = compiled(add_up, number((B, 2, PLACES)), whole((B, PLACES)), whole((B,)), number((B, 2, D)))
    assert program.memory.temp_size_in_bytes < B * PLACES * D * 4 / 20


@pytest.mark.slow
def test_the_sparse_step_writes_its_scores_once_and_reads_them_twice():
    """By the product; for maxima and for places, at which they are looked up."""
    case = step("sparsemax", Shape(B, D, M), PLACES)
    program = compile_for("h100", case.function, *case.arguments, donate=case.donate)
    assert program.passes(B * M) == [("fusion", 0, 1), ("fusion", 1, 0), ("fusion", 1, 0)]
    assert program.memory.alias_size_in_bytes > 3 * 4 * M * D  # parameters and Adam's moments, in place


def test_the_dense_step_counts_active_concepts_while_it_writes_them():
    case = step("sparsemax", Shape(B, D, M), None)
    program = compile_for("h100", case.function, *case.arguments, donate=case.donate)
    scores, silenced_and_maxima, newton, activations_and_counts, *others = program.passes(B * M)
    assert [scores, newton[0]] == [("fusion", 0, 1), "while"]
    assert silenced_and_maxima == activations_and_counts == ("fusion", 1, 1)
    decoding, of_values, of_activations, of_scores, of_keys, of_query = (
        ("fusion", 1, 0),
        ("fusion", 1, 0),
        ("fusion", 0, 1),
        ("fusion", 2, 1),
        ("fusion", 1, 0),
        ("fusion", 1, 0),
    )
    assert sorted(others) == sorted([decoding, of_values, of_activations, of_scores, of_keys, of_query])
