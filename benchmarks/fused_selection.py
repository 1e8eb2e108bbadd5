"""Scores that never leave the chip: the product with all keys and sparsemax in one TPU kernel. A prototype.

    JAX_PLATFORMS=cpu python -m benchmarks.fused_selection

It needs libtpu (the extra ``compiled-tpu``) and no TPU, compiles both ways and sets what each moves beside what the
chip's bandwidth and matrix units allow. Nothing is run or timed.

Sparsemax needs a whole row of scores, so a block of rows of scores has to fit on the chip, and all keys are read anew
for every block. That is what the scores' way to memory and back is to be weighed against.
"""

import functools
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.harness import Figures
from benchmarks.results import publish
from benchmarks.tpu_compiler import CHIPS, compile_for
from jax_sae import sparsemax
from jax_sae.ops.sparsemax import pallas_tpu_kernel

MB, US = 1e6, 1e-6
SUBLANES = 8


def fused(query: jax.Array, keys: jax.Array, *, rows: int, columns: int, interpret: bool = False) -> jax.Array:
    """Sparsemax, [B, M] float32, of ``query @ keys.T``.

    Args:
      query: [B, d] bfloat16, B a multiple of ``rows``.
      keys: [M, d] bfloat16, M a multiple of ``columns``.
      rows: of scores on the chip, a multiple of 8.
      columns: keys that are read at a time, a multiple of 128.
      interpret: run without a TPU.
    """
    (batch, d), concepts = query.shape, len(keys)
    if batch % rows or concepts % columns:
        raise ValueError(f"{batch} rows and {concepts} keys; expected multiples of {rows} and {columns}")
    held = 2 * (rows * concepts * 4 + columns * d * 2 + rows * d * 2)
    traffic = batch * concepts * 4 + query.nbytes + batch // rows * keys.nbytes
    return pl.pallas_call(
        functools.partial(_kernel, columns=columns),
        out_shape=jax.ShapeDtypeStruct((batch, concepts), jnp.float32),
        grid=(batch // rows, concepts // columns),
        in_specs=[pl.BlockSpec((rows, d), lambda i, j: (i, 0)), pl.BlockSpec((columns, d), lambda i, j: (j, 0))],
        out_specs=pl.BlockSpec((rows, concepts), lambda i, j: (i, 0)),
        cost_estimate=pl.CostEstimate(2 * batch * concepts * d, 0, traffic),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=held + (4 << 20)
        ),
        interpret=interpret,
        name="fused_selection",
    )(query, keys)


def _kernel(query_ref: Any, keys_ref: Any, p_ref: Any, *, columns: int) -> None:
    """Scores go where p will be; with the last of them there, 8 rows at a time are solved in place."""
    block = pl.program_id(1)
    scores = lax.dot_general(
        query_ref[...], keys_ref[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    p_ref[:, pl.ds(pl.multiple_of(block * columns, columns), columns)] = scores

    @pl.when(block == pl.num_programs(1) - 1)
    def _() -> None:
        rows, concepts = p_ref.shape
        chunk = pallas_tpu_kernel.choose_blocks(jax.ShapeDtypeStruct((SUBLANES, concepts), jnp.float32)).chunk

        def solve(i: jax.Array, carry: int) -> int:
            few = p_ref.at[pl.ds(pl.multiple_of(i * SUBLANES, SUBLANES), SUBLANES)]
            pallas_tpu_kernel.project_block(few, few, width=concepts, chunk=chunk)
            return carry

        lax.fori_loop(0, rows // SUBLANES, solve, 0)


def apart(query: jax.Array, keys: jax.Array) -> jax.Array:
    """The same as the library has it: the compiler's product, and the kernel of sparsemax."""
    return sparsemax(jnp.matmul(query, keys.T, preferred_element_type=jnp.float32))


def figures_of(chip: str, batch: int, d: int, concepts: int) -> list[dict[str, str | float]]:
    """A line for both ways: the rows of the fused one as many as fit in seven eighths of the chip's memory."""
    kind = CHIPS[chip]
    matmul = 2 * batch * concepts * d / kind.matmul_rate / US
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((batch, d), (concepts, d))]
    of_scores, of_keys = batch * concepts * 4, concepts * d * 2
    rows = 1 << ((kind.on_chip * 7 // 8) // (2 * concepts * 4)).bit_length() - 1
    lines = []
    for name, function, traffic in (
        ("apart", apart, 3 * of_scores + of_keys),
        (f"fused, {rows} rows", functools.partial(fused, rows=rows, columns=1024), of_scores + batch // rows * of_keys),
    ):
        program = compile_for(chip, function, *arrays)
        lines.append(
            {
                "TPU": chip,
                "product and sparsemax": name,
                "moved MB": traffic / MB,
                "temporaries MB": program.memory.temp_size_in_bytes / MB,
                "limit of bandwidth us": traffic / kind.bandwidth / US,
                "limit of the matrix units us": matmul,
            }
        )
    return lines


def main(chips: tuple[str, ...] = ("v5e", "v5p", "v6e", "tpu7x"), batch: int = 4096) -> None:
    """Compile the product with all keys and sparsemax as two kernels and as one, and tabulate what they move.

    Args:
      chips: names of benchmarks.tpu_compiler.CHIPS.
      batch: rows, a multiple of 256.
    """
    jax.config.update("jax_platforms", "cpu")
    d, concepts = 768, 49_152
    title = f"{batch} x {d} with {concepts} keys, libtpu {version('libtpu')}. Compiled only: nothing ran on a TPU."
    lines = [line for chip in chips for line in figures_of(chip, batch, d, concepts)]
    publish("fused_selection", [], figures=[Figures(title, tuple(lines))])


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.fused_selection")
