"""The Mosaic TPU kernel of sparsemax: a block of rows is read once into on-chip memory and solved there."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_sae.ops.sparsemax.solver import Threshold

Sums = tuple[jax.Array, jax.Array]
Ref = Any
Carry = TypeVar("Carry")

_LANES = 128
_BLOCK_BYTES = 1 << 20  # of scores in a block of short rows; smaller transfers leave the memory idle between two
_MOST_ROWS = 64
_CHUNK_SCORES = 8192  # eight vector registers
_UNROLL = 4
_MAX_SWEEPS = 100
_USUAL_SWEEPS = 4  # for the estimate of cost, as is the next
_OPERATIONS = 7  # on a score in a sweep
_VMEM_SLACK = 4 << 20  # for what the compiler keeps beside the blocks


class Blocks(NamedTuple):
    """How scores [B, M] are cut up.

    Attributes:
      rows: of a block. They are solved together, until the last of them is done.
      width: of a block, M rounded up to whole chunks.
      chunk: columns that are worked on at a time, a multiple of 128; also the number of groups whose maxima bound the
        threshold from below.
    """

    rows: int
    width: int
    chunk: int


def choose_blocks(z: jax.Array | jax.ShapeDtypeStruct) -> Blocks:
    """8 rows (16 of two-byte scores), and up to 64 where they are short."""
    (batch, width), itemsize = z.shape, z.dtype.itemsize
    rows = 32 // itemsize
    while rows < min(batch, _MOST_ROWS) and 2 * rows * width * itemsize <= _BLOCK_BYTES:
        rows *= 2
    chunk = min(max(_CHUNK_SCORES // rows, _LANES), pl.cdiv(width, _LANES) * _LANES)
    return Blocks(rows, pl.cdiv(width, chunk) * chunk, chunk)


def threshold_call(z: jax.Array, *, buffers: int) -> Threshold:
    """``(top, tau, count)`` [B, 1] of ``z [B, M]`` as :class:`jax_sae.ops.sparsemax.solver.Solver` has them.

    Args:
      z: float32 or bfloat16, B and M >= 1.
      buffers: blocks of rows held at a time: 2 to read one while another is solved, 1 for rows so long that two do not
        fit.
    """
    outputs = [_output(z, 1, dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32)]
    blocks = choose_blocks(z)
    written = (blocks.rows, 1)
    top, tau, count = _call(_threshold_kernel, "sparsemax_threshold_tpu", z, outputs, blocks, written, buffers)
    return top, tau, count


def project_call(z: jax.Array) -> jax.Array:
    """Sparsemax of ``z [B, M]``, float32 or bfloat16, B and M >= 1, of the same shape and dtype."""
    outputs = [_output(z, z.shape[1], z.dtype)]
    blocks = choose_blocks(z)
    (p,) = _call(project_block, "sparsemax_tpu", z, outputs, blocks, (blocks.rows, blocks.width), buffers=2)
    return p


def _output(z: jax.Array, width: int, dtype: Any) -> jax.ShapeDtypeStruct:
    """[B, width], varying over the axes of ``shard_map`` that z varies over."""
    return jax.ShapeDtypeStruct((len(z), width), dtype, manual_axis_type=jax.typeof(z).manual_axis_type)


def _call(
    kernel: Callable[..., None],
    name: str,
    z: jax.Array,
    outputs: list[jax.ShapeDtypeStruct],
    blocks: Blocks,
    written: tuple[int, int],
    buffers: int,
) -> list[jax.Array]:
    """``kernel`` on blocks of rows of ``z``; ``written`` is the shape of a block of every output."""
    of_rows = lambda i: (i, 0)  # noqa: E731
    mode = None if buffers == 2 else pl.Buffered(buffers)
    held = buffers * blocks.width * z.dtype.itemsize
    held += 2 * sum(max(written[1], _LANES) * out.dtype.itemsize for out in outputs)
    traffic = z.nbytes + sum(math.prod(out.shape) * out.dtype.itemsize for out in outputs)
    call = pl.pallas_call(
        functools.partial(kernel, width=z.shape[1], chunk=blocks.chunk),
        out_shape=outputs,
        grid=(pl.cdiv(len(z), blocks.rows),),
        in_specs=[pl.BlockSpec((blocks.rows, blocks.width), of_rows, pipeline_mode=mode)],
        out_specs=[pl.BlockSpec(written, of_rows) for _ in outputs],
        cost_estimate=pl.CostEstimate(_OPERATIONS * _USUAL_SWEEPS * z.size, 0, traffic),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=blocks.rows * held + _VMEM_SLACK
        ),
        name=name,
    )
    with jax.enable_x64(False):  # a TPU's kernels have no numbers of 64 bits
        return call(z)


def _threshold_kernel(z_ref: Ref, top_ref: Ref, tau_ref: Ref, count_ref: Ref, *, width: int, chunk: int) -> None:
    top, tau, count = _solve(z_ref, width, chunk)
    top_ref[...] = top
    tau_ref[...] = tau
    count_ref[...] = jnp.where(jnp.isnan(tau), 0.0, count).astype(jnp.int32)


def project_block(z_ref: Ref, p_ref: Ref, *, width: int, chunk: int) -> None:
    """Sparsemax of a block of rows on the chip, as :class:`Blocks` has them; ``p_ref`` may be ``z_ref``."""
    top, tau, _ = _solve(z_ref, width, chunk)

    def write(at: Any, z: jax.Array, carry: int) -> int:
        p_ref[:, at] = _excess(z, top, tau)[0].astype(p_ref.dtype)
        return carry

    _over_chunks(z_ref, z_ref.shape[1], chunk, write, 0)  # what is beyond the row's end goes nowhere


def _solve(z_ref: Ref, width: int, chunk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(top, tau, count) [rows, 1] float32: Newton's method, from the threshold of the maxima of strided groups.

    NaN reaches tau through the sums, whether or not a maximum drops it; so does the NaN that an infinite maximum makes
    when it is subtracted.
    """
    block = (z_ref.shape[0], chunk)
    lowest = jnp.full(block, -jnp.inf, jnp.float32)
    maxima = _over_chunks(z_ref, width, chunk, lambda at, z, found: jnp.maximum(found, z), lowest)
    top = jnp.max(maxima, axis=1, keepdims=True)
    start = jnp.full_like(top, -1)
    if width > chunk:
        below, _ = _newton(lambda tau: _row_sums(_excess(maxima, top, tau)), start)
        # Rounding must not push the start above the threshold: f >= 0 there keeps Newton monotone.
        start = jnp.maximum(below - 8 * float(jnp.finfo(jnp.float32).eps), start)

    def sweep(tau: jax.Array) -> Sums:
        def add(at: Any, z: jax.Array, sums: Sums) -> Sums:
            excess, inside = _excess(z, top, tau)
            return sums[0] + excess, sums[1] + inside

        zeros = jnp.zeros(block, jnp.float32)
        return _row_sums(_over_chunks(z_ref, width, chunk, add, (zeros, zeros)))

    tau, count = _newton(sweep, start)
    return top, tau, count


def _newton(sums: Callable[[jax.Array], Sums], start: jax.Array) -> Sums:
    """(tau, count) [rows, 1] float32 from the lower bound ``start``.

    A row is done, and kept as it is, when its count stays the same or its tau no longer rises, which NaN never does;
    rounding would make some rows go up and down for ever by the first rule alone.
    """

    def step(carry: tuple) -> tuple:
        sweeps, tau, count, moving, _ = carry
        total, new_count = sums(tau)
        new_tau = tau + (total - 1) / new_count
        goes_on = (moving > 0) & (new_count != count) & ((new_tau > tau) | (count < 0))
        still_moving = jnp.where(goes_on, 1.0, 0.0)  # loops carry no vectors of booleans here
        tau, count = jnp.where(moving > 0, new_tau, tau), jnp.where(moving > 0, new_count, count)
        return sweeps + 1, tau, count, still_moving, jnp.max(still_moving)

    begin = (jnp.int32(0), start, jnp.full_like(start, -1), jnp.ones_like(start), jnp.float32(1))
    _, tau, count, _, _ = lax.while_loop(lambda carry: (carry[0] < _MAX_SWEEPS) & (carry[4] > 0), step, begin)
    return tau, count


def _over_chunks(
    z_ref: Ref, width: int, chunk: int, step: Callable[[Any, jax.Array, Carry], Carry], carry: Carry
) -> Carry:
    """``step(columns, scores [rows, chunk] float32, carry)`` over all columns; -inf stands beyond the row's end."""
    whole, rest = divmod(width, chunk)

    def one(i: Any, carry: Carry) -> Carry:
        at = pl.ds(i * chunk if isinstance(i, int) else pl.multiple_of(i * chunk, chunk), chunk)
        return step(at, z_ref[:, at].astype(jnp.float32), carry)

    def several(i: jax.Array, carry: Carry) -> Carry:
        # Unrolled by hand: over the remainder that ``unroll`` leaves, the compiler of jax 0.11 crashes.
        for j in range(_UNROLL):
            carry = one(_UNROLL * i + j, carry)
        return carry

    carry = lax.fori_loop(0, whole // _UNROLL, several, carry)
    for i in range(whole - whole % _UNROLL, whole):
        carry = one(i, carry)
    if rest:
        at = pl.ds(whole * chunk, chunk)
        scores = z_ref[:, at].astype(jnp.float32)
        exists = lax.broadcasted_iota(jnp.int32, scores.shape, 1) < rest
        carry = step(at, jnp.where(exists, scores, -jnp.inf), carry)
    return carry


def _excess(z: jax.Array, top: jax.Array, tau: jax.Array) -> Sums:
    """max(z - top - tau, 0), which keeps NaN as ``max`` may not, and 1 where it is not 0."""
    above = (z - top) - tau
    outside = above <= 0
    return jnp.where(outside, 0.0, above), jnp.where(outside, 0.0, 1.0)


def _row_sums(sums: Sums) -> Sums:
    return jnp.sum(sums[0], axis=1, keepdims=True), jnp.sum(sums[1], axis=1, keepdims=True)
