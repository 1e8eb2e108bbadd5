"""What the real compiler for TPUs makes of the parts of a training step: on all concepts, and on a few places of a row.

    JAX_PLATFORMS=cpu python -m benchmarks.compiled_parts

It needs libtpu (the extra ``compiled-tpu``) and no TPU. Nothing is run or timed: the cycles are what the compiler
expects of the operations that it has a model of, which sorts, scatters and its own gathers and top-k are not.
"""

from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from benchmarks.harness import Figures
from benchmarks.results import publish
from benchmarks.shapes import SHAPES, Shape
from benchmarks.tpu_compiler import compile_for
from jax_sae import top_k_mask
from jax_sae.ops.compaction import compact
from jax_sae.ops.products import score_products
from jax_sae.ops.rows import accumulate_rows, combine_rows, dot_rows, plan_blocks

MB, GIGA = 1e6, 1e9
PLACES = 64
Part = tuple[str, Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]


def parts(shape: Shape, places: int) -> tuple[Part, ...]:
    """(name, function, arguments) of every part: scores, selection, decoding and gradients."""
    number = lambda *lengths: jax.ShapeDtypeStruct(lengths, jnp.float32)  # noqa: E731
    whole = lambda *lengths: jax.ShapeDtypeStruct(lengths, jnp.int32)  # noqa: E731
    rows, table, dense = (
        number(shape.rows, shape.d),
        number(shape.concepts, shape.d),
        number(shape.rows, shape.concepts),
    )
    weights, row = number(shape.rows, 1, places), number(shape.rows, 1, shape.d)
    where = whole(shape.rows, places), whole(shape.rows)

    def decode(weights: jax.Array, indices: jax.Array, count: jax.Array, table: jax.Array) -> jax.Array:
        return combine_rows(weights, plan_blocks(indices, count)[0], table)

    def multiply(row: jax.Array, indices: jax.Array, count: jax.Array, table: jax.Array) -> jax.Array:
        return dot_rows(row, plan_blocks(indices, count)[0], table, places)

    def add_up(weights: jax.Array, indices: jax.Array, count: jax.Array, row: jax.Array) -> jax.Array:
        return accumulate_rows(weights, plan_blocks(indices, count)[0], row, shape.concepts)

    return (
        ("scores", score_products, (rows, table)),
        ("the 32 largest, as a mask", lambda z: top_k_mask(z, 32), (dense,)),
        (
            "places of what is above a bound",
            lambda z, bound: compact(z > bound, places),
            (dense, number(shape.rows, 1)),
        ),
        ("decoding", jnp.matmul, (dense, table)),
        ("decoding, at places", decode, (weights, *where, table)),
        ("gradient of the activations", lambda dy, table: dy @ table.T, (rows, table)),
        ("gradient of the activations, at places", multiply, (row, *where, table)),
        ("gradient of the dictionary", lambda p, dy: p.T @ dy, (dense, rows)),
        ("gradient of the dictionary, at places", add_up, (weights, *where, row)),
    )


def compiled_parts(chips: tuple[str, ...], shape: Shape) -> Iterator[dict[str, str | float]]:
    """A line for every part on every chip."""
    for chip in chips:
        for name, function, arguments in parts(shape, PLACES):
            program = compile_for(chip, function, *arguments)
            yield {
                "TPU": chip,
                "part": name,
                "GFLOP": program.cost["flops"] / GIGA,
                "compiler's count MB": program.cost["bytes accessed"] / MB,
                "temporaries MB": program.memory.temp_size_in_bytes / MB,
                "modelled cycles, thousands": program.cycles / 1e3,
                "sorts": program.count("sort"),
                "gathers": program.count("gather"),
                "scatters": program.count("scatter"),
            }


def main(chips: tuple[str, ...] = ("v5e", "v6e"), rows: int = 1024) -> None:
    """Compile the parts of a training step for TPUs and tabulate what the compiler says.

    Args:
      chips: names of benchmarks.tpu_compiler.CHIPS.
      rows: of a batch.
    """
    jax.config.update("jax_platforms", "cpu")
    shape = Shape(rows, SHAPES["vision"].d, SHAPES["vision"].concepts)
    title = (
        f"{shape.rows} x {shape.d}, {shape.concepts} concepts, {PLACES} places, libtpu {version('libtpu')}. "
        "Compiled only: nothing of this has run on a TPU."
    )
    publish("compiled_parts", [], figures=[Figures(title, tuple(compiled_parts(chips, shape)))])


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.compiled_parts")
