"""Sparsemax on NVIDIA GPUs of the Hopper and Blackwell generations, as a Pallas kernel for Mosaic GPU.

One warpgroup of 128 threads solves one row by the method of :func:`jax_sae.ops.sparsemax.xla.newton_threshold`. The row
stays in shared memory where it fits (224 KiB: 57,344 scores of float32 or 114,688 of half precision), so that scores
are read once and p is written once. A longer row is streamed through shared memory once for the maximum, once for each
of about three steps of Newton's method, and once for p.

The kernel is opt-in, ``implementation="pallas_gpu"``: the compilers for H100 and B200 accept it, and in an interpreter
it agrees with the definition, but it has not been run or timed on a GPU.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_sae.ops.sparsemax.solver import Solver, Threshold

LINE = 256  # columns: the widest box that the copy engine moves

_MEMORY = 224 * 1024  # of the 227 KiB that a block of threads may have; the rest is for barriers and reductions
_CHUNK_LINES = (32, 16, 8, 4, 2, 1)
_BLOCK_LINES = 4
_STREAMING_SLOTS = 4
_MAX_INDEX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a row of ``width`` >= LINE columns goes through shared memory.

    It is cut into chunks of ``lines`` lines of LINE columns, and there is room for ``slots`` chunks. All chunks are of
    one size: the last ends where the row ends, and shares ``overlap`` columns with the one before.
    """

    width: int
    lines: int
    slots: int

    @property
    def columns(self) -> int:
        """Columns of a chunk."""
        return self.lines * LINE

    @property
    def chunks(self) -> int:
        """Chunks of the row."""
        return math.ceil(self.width / self.columns)

    @property
    def overlap(self) -> int:
        """Columns of the last chunk that the one before it has too."""
        return self.chunks * self.columns - self.width

    @property
    def stays(self) -> bool:
        """Whether the whole row stays in shared memory; one that does not is read anew in every sweep."""
        return self.slots == self.chunks

    @property
    def in_lines(self) -> bool:
        """Whether rows are whole lines, so that one copy moves a chunk; otherwise each line is a copy."""
        return self.width % LINE == 0

    @property
    def block(self) -> int:
        """Lines that are in registers at a time; as many groups have their maxima taken as these have columns."""
        return min(self.lines, _BLOCK_LINES)


def plan_row(width: int, itemsize: int, memory: int = _MEMORY) -> Plan:
    """The plan for rows of ``width`` >= LINE columns of ``itemsize`` bytes in ``memory`` bytes of shared memory.

    The row stays if it fits, else it is streamed: with the largest chunks that fit and overlap by at most an eighth of
    the row.

    Raises:
      ValueError: there is not room enough for the slots of a streamed row.
    """
    sizes = [lines for lines in _CHUNK_LINES if lines * LINE <= width]
    whole = [Plan(width, lines, math.ceil(width / (lines * LINE))) for lines in sizes]
    streamed = [Plan(width, lines, _STREAMING_SLOTS) for lines in sizes]
    for plans in whole, streamed:
        fitting = [plan for plan in plans if plan.slots * plan.columns * itemsize <= memory]
        if fitting:
            return next((plan for plan in fitting if 8 * plan.overlap <= width), fitting[-1])
    raise ValueError(f"shared memory has {memory} bytes; expected at least {_STREAMING_SLOTS * LINE * itemsize}")


def gpu_solver(memory: int = _MEMORY, interpret: Any = None) -> Solver:
    """The solver for scores of float32, bfloat16 or float16 and rows of any width; other dtypes are refused.

    Rows whose width is not a multiple of 256 take a copy for each line instead of one for each chunk. Where they have
    fewer than 256 columns, or the batch 2**31 scores or more, the scores are padded to such a multiple before and p is
    cut after, which adds a read and a write of each.

    The compiler cannot split the kernel over devices by itself: call it inside ``shard_map``, on whole rows.
    Elsewhere than on a GPU it is refused when the program is compiled.

    Args:
      memory: bytes of shared memory for the scores of a row.
      interpret: None to run on a GPU; the parameters of an interpreter of Mosaic GPU to run on it.
    """
    run = partial(_over_batches, partial(_solve, memory=memory, interpret=interpret))
    return Solver(partial(_threshold, run), partial(_project, run))


def _threshold(run: Callable[..., Any], z: jax.Array, axis_name: str | None) -> Threshold:
    _check(z, axis_name)
    return run(z, project=False)


def _project(run: Callable[..., Any], z: jax.Array, axis_name: str | None) -> jax.Array:
    _check(z, axis_name)
    return run(z, project=True)


def _check(z: jax.Array, axis_name: str | None) -> None:
    if axis_name is not None:
        raise ValueError(f"implementation 'pallas_gpu' takes whole rows, but axis_name is {axis_name!r}; expected None")
    if z.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"implementation 'pallas_gpu' got {z.dtype}; expected float32, bfloat16 or float16 scores")


def _over_batches(solve: Callable[..., Any], z: jax.Array, *, project: bool) -> Any:
    """``solve``, whose ``vmap`` is one kernel over more rows: the copy engine takes no strides of odd size.

    Not a :func:`jax_sae.ops.kernels.rows_operation`: the interpreter of Mosaic GPU has effects, which a primitive's
    lowering cannot add to a program.
    """

    @jax.custom_batching.custom_vmap
    def rows(z: jax.Array) -> Any:
        return solve(z, project=project)

    @rows.def_vmap
    def _(size: int, _: list[bool], z: jax.Array) -> tuple[Any, Any]:
        out = rows(z.reshape(size * z.shape[1], z.shape[2]))
        apart = jax.tree.map(lambda x: x.reshape(size, z.shape[1], x.shape[-1]), out)
        return apart, jax.tree.map(lambda _: True, out)

    return rows(z)


def _solve(z: jax.Array, *, memory: int, interpret: Any, project: bool) -> Any:
    """With ``project`` p [B, M], without it (top, tau, count), each [B, 1]."""
    from jax_sae.ops.sparsemax import pallas_gpu_kernel  # here, because importing Pallas takes time

    rows, width = z.shape
    if rows == 0:
        none = jnp.zeros((0, 1), jnp.float32)
        return z if project else (none, none, none.astype(jnp.int32))
    rest = -width % LINE
    if rest and (width < LINE or z.size > _MAX_INDEX):
        z = jnp.pad(z, ((0, 0), (0, rest)), constant_values=-jnp.inf)
    plan = plan_row(z.shape[1], z.dtype.itemsize, memory)
    out = pallas_gpu_kernel.solve(z, plan, project=project, interpret=interpret)
    return out[:, :width] if project else tuple(x[:, None] for x in out)


PALLAS_GPU = gpu_solver()
