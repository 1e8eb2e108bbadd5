"""The Mosaic TPU kernel of sparsemax: a block of rows is read once into on-chip memory and solved there."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_sae.ops.sparsemax.solver import Threshold

Sums = tuple[jax.Array, jax.Array]
Carry = TypeVar("Carry")

_LANES = 128
_BLOCK_BYTES = 1 << 20  # of scores in a block of rows; smaller ones leave the memory idle between two transfers
_MOST_ROWS = 64
_ACCUMULATED = 8192  # scores in a chunk: eight vector registers
_UNROLL = 4
_MAX_SWEEPS = 100
_SWEEPS = 4  # that most rows take, for the estimate of cost
_OPERATIONS = 7  # on a score in a sweep
_VMEM_SLACK = 4 << 20  # for what the compiler keeps beside the blocks


class Blocks(NamedTuple):
    """How scores [B, M] are cut up.

    Attributes:
      rows: of a block. They are solved together, until the last of them is done.
      chunk: columns that are worked on at a time, a multiple of 128; also the number of groups whose maxima bound the
        threshold from below.
    """

    rows: int
    chunk: int


def choose_blocks(shape: tuple[int, ...], dtype: jnp.dtype) -> Blocks:
    """Blocks of 8 rows (16 of two-byte scores), of up to 64 where rows are short."""
    batch, width = shape
    rows = 32 // dtype.itemsize
    while rows < min(batch, _MOST_ROWS) and 2 * rows * width * dtype.itemsize <= _BLOCK_BYTES:
        rows *= 2
    return Blocks(rows, min(max(_ACCUMULATED // rows, _LANES), pl.cdiv(width, _LANES) * _LANES))


def threshold_call(z: jax.Array, *, buffers: int) -> Threshold:
    """``(top, tau, count)`` [B, 1] of ``z [B, M]`` as :class:`jax_sae.ops.sparsemax.solver.Solver` has them.

    Args:
      z: float32 or bfloat16, B and M >= 1.
      buffers: blocks of rows held at a time: 2 to read one while another is solved, 1 for rows so long that two do not
        fit.
    """
    outputs = [((len(z), 1), dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32)]
    rows, _ = choose_blocks(z.shape, z.dtype)
    top, tau, count = _call(_threshold_kernel, z, outputs, (rows, 1), buffers=buffers, name="sparsemax_threshold_tpu")
    return top, tau, count


def project_call(z: jax.Array) -> jax.Array:
    """The p of ``z [B, M]``, float32 or bfloat16, B and M >= 1, of the same shape and dtype."""
    block = _block_shape(z)
    (p,) = _call(_project_kernel, z, [(z.shape, z.dtype)], block, buffers=2, name="sparsemax_tpu")
    return p


def _block_shape(z: jax.Array) -> tuple[int, int]:
    rows, chunk = choose_blocks(z.shape, z.dtype)
    return rows, pl.cdiv(z.shape[1], chunk) * chunk


def _call(
    kernel: Callable[..., None],
    z: jax.Array,
    outputs: Sequence[tuple[tuple[int, ...], Any]],
    output_block: tuple[int, int],
    *,
    buffers: int,
    name: str,
) -> list[jax.Array]:
    varying = jax.typeof(z).manual_axis_type
    shapes = [jax.ShapeDtypeStruct(*output, manual_axis_type=varying) for output in outputs]
    block = _block_shape(z)
    mode = None if buffers == 2 else pl.Buffered(buffers)
    of_rows = lambda i: (i, 0)  # noqa: E731
    lanes = [max(width, _LANES) for width in (output_block[1],) * len(outputs)]
    held = block[0] * (buffers * block[1] * z.dtype.itemsize + 2 * 4 * sum(lanes))
    traffic = z.nbytes + sum(math.prod(shape.shape) * shape.dtype.itemsize for shape in shapes)
    return pl.pallas_call(
        functools.partial(kernel, width=z.shape[1], chunk=choose_blocks(z.shape, z.dtype).chunk),
        out_shape=shapes,
        grid=(pl.cdiv(len(z), block[0]),),
        in_specs=[pl.BlockSpec(block, of_rows, pipeline_mode=mode)],
        out_specs=[pl.BlockSpec(output_block, of_rows) for _ in outputs],
        cost_estimate=pl.CostEstimate(flops=_OPERATIONS * _SWEEPS * z.size, transcendentals=0, bytes_accessed=traffic),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=held + _VMEM_SLACK),
        name=name,
    )(z)


def _threshold_kernel(z_ref: Any, top_ref: Any, tau_ref: Any, count_ref: Any, *, width: int, chunk: int) -> None:
    top, tau, count = _solve(z_ref, width, chunk)
    top_ref[...] = top
    tau_ref[...] = tau
    count_ref[...] = jnp.where(jnp.isnan(tau), 0.0, count).astype(jnp.int32)


def _project_kernel(z_ref: Any, p_ref: Any, *, width: int, chunk: int) -> None:
    top, tau, _ = _solve(z_ref, width, chunk)

    def write(at: Any, z: jax.Array, carry: jax.Array) -> jax.Array:
        p_ref[:, at] = _excess(z, top, tau)[0].astype(p_ref.dtype)
        return carry

    _over_chunks(z_ref, width, chunk, write, jnp.int32(0))


def _solve(z_ref: Any, width: int, chunk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(top, tau, count) [rows, 1] float32: Newton's method, from the threshold of the maxima of strided groups.

    NaN reaches tau through the sums, whether or not a maximum drops it; so does the NaN that an infinite maximum makes
    when it is subtracted.
    """
    lowest = jnp.full((z_ref.shape[0], chunk), -jnp.inf, jnp.float32)
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

        zeros = jnp.zeros(lowest.shape, jnp.float32)
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
        goes_on = jnp.where(goes_on, 1.0, 0.0)  # booleans are not carried by loops here
        tau, count = jnp.where(moving > 0, new_tau, tau), jnp.where(moving > 0, new_count, count)
        return sweeps + 1, tau, count, goes_on, jnp.max(goes_on)

    begin = (jnp.int32(0), start, jnp.full_like(start, -1), jnp.ones_like(start), jnp.float32(1))
    _, tau, count, _, _ = lax.while_loop(lambda carry: (carry[0] < _MAX_SWEEPS) & (carry[4] > 0), step, begin)
    return tau, count


def _over_chunks(
    z_ref: Any, width: int, chunk: int, step: Callable[[Any, jax.Array, Carry], Carry], carry: Carry
) -> Carry:
    """``step(columns, scores [rows, chunk] float32, carry)`` over all columns; -inf stands beyond the row's end."""
    whole, rest = divmod(width, chunk)

    def one(i: jax.Array, carry: Carry) -> Carry:
        at = pl.ds(pl.multiple_of(i * chunk, chunk), chunk)
        return step(at, z_ref[:, at].astype(jnp.float32), carry)

    carry = lax.fori_loop(0, whole, one, carry, unroll=_UNROLL if whole >= _UNROLL else True)
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
