"""What the real compiler for TPUs makes of sparsemax: memory, code, and the time that the memory's bandwidth allows.

    JAX_PLATFORMS=cpu python -m benchmarks.compiled_tpu

It needs libtpu (the extra ``compiled-tpu``) and no TPU. Nothing is run or timed: no figure says how fast a program is,
only what it moves and holds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from benchmarks.harness import Figures
from benchmarks.results import publish
from benchmarks.tpu_compiler import CHIPS, Program, compile_for
from jax_sae import sparsemax, sparsemax_threshold

MB, KB, US = 1e6, 1e3, 1e-6


def pullback(z: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The gradient of sparsemax, p included: as a training step has it."""
    return jax.vjp(sparsemax, z)[1](cotangent)[0]


def plain(z: jax.Array) -> jax.Array:
    """Sparsemax without the kernel."""
    return sparsemax(z, implementation="xla")


@dataclass(frozen=True)
class Case:
    """A program: a function of ``arguments`` arrays of one shape and dtype."""

    name: str
    function: Callable[..., Any]
    shape: tuple[int, int] = (1024, 49_152)
    dtype: Any = jnp.float32
    arguments: int = 1


CASES = (
    Case("p", sparsemax),
    Case("p, bfloat16", sparsemax, dtype=jnp.bfloat16),
    Case("p, odd width", sparsemax, (1001, 50_257)),
    Case("p, a million scores", sparsemax, (64, 1 << 20)),
    Case("threshold", sparsemax_threshold),
    Case("threshold, a million scores", sparsemax_threshold, (64, 1 << 20)),
    Case("gradient", pullback, arguments=2),
    Case("p without the kernel", plain),
)
NEEDS_MORE_MEMORY = {"v4": {"p, a million scores", "threshold, a million scores"}}


def figures_of(chip: str, case: Case, program: Program) -> dict[str, str | float]:
    """One line of the table.

    Bytes in and out are of the arrays that the program takes and gives, each once: what any program has to move. The
    compiler's count of bytes takes a kernel's own estimate for the kernel and every loop as if it went around once.
    """
    moved = program.memory.argument_size_in_bytes + program.memory.output_size_in_bytes
    return {
        "TPU": chip,
        "program": case.name,
        "scores": f"{case.shape[0]} x {case.shape[1]} {jnp.dtype(case.dtype).name}",
        "kernels": len(program.kernels),
        "in and out MB": moved / MB,
        "compiler's count MB": program.cost["bytes accessed"] / MB,
        "temporaries MB": program.memory.temp_size_in_bytes / MB,
        "on-chip memory of the kernel MiB": sum(program.kernel_memory) / 2**20,
        "code KB": program.memory.generated_code_size_in_bytes / KB,
        "limit of bandwidth us": moved / CHIPS[chip].bandwidth / US,
    }


def compiled_cases(chips: tuple[str, ...]) -> Iterator[dict[str, str | float]]:
    """A line for every case on every chip."""
    for chip in chips:
        for case in CASES:
            if case.name not in NEEDS_MORE_MEMORY.get(chip, ()):
                arrays = [jax.ShapeDtypeStruct(case.shape, case.dtype)] * case.arguments
                yield figures_of(chip, case, compile_for(chip, case.function, *arrays))


def main(chips: tuple[str, ...] = tuple(CHIPS)) -> None:
    """Compile sparsemax for TPUs and tabulate what the compiler says.

    Args:
      chips: names of benchmarks.tpu_compiler.CHIPS.
    """
    jax.config.update("jax_platforms", "cpu")
    title = f"sparsemax through libtpu {version('libtpu')}. Compiled only: nothing of this has run on a TPU."
    publish("compiled_tpu", [], figures=[Figures(title, tuple(compiled_cases(chips)))])


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.compiled_tpu")
