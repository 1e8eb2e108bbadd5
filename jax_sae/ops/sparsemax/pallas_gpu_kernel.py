"""The kernel behind :mod:`jax_sae.ops.sparsemax.pallas_gpu`, apart from it because importing Pallas takes time."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_sae.ops.sparsemax.pallas_gpu import LINE, Plan

Carry = TypeVar("Carry")

_MAX_SWEEPS = 100
_THREADS = 128  # of a warpgroup


@dataclasses.dataclass(frozen=True)
class _Row:
    """One row on its way through shared memory.

    Attributes:
      plan: how it is cut into chunks.
      index: which of the rows it is.
      scores: all rows in global memory: [B * M / LINE, LINE] if M is a multiple of LINE, [B * M] otherwise.
      slots: [plan.slots, plan.lines, LINE] in shared memory.
      arrived: one barrier for each slot.
    """

    plan: Plan
    index: jax.Array
    scores: Any
    slots: Any
    arrived: Any

    def slot(self, chunk: jax.Array) -> jax.Array:
        return lax.rem(chunk, np.int32(self.plan.slots))

    def start(self, chunk: jax.Array) -> jax.Array:
        """The first column of ``chunk``."""
        return jnp.minimum(chunk * self.plan.columns, self.plan.width - self.plan.columns)

    def copies(self, rows: Any, chunk: jax.Array) -> list[tuple[Any, Any]]:
        """(global memory, shared memory) of every copy that moves ``chunk`` of the row in ``rows``."""
        plan, slot = self.plan, self.slots.at[self.slot(chunk)]
        if plan.in_lines:
            first = self.index * (plan.width // LINE) + lax.div(self.start(chunk), np.int32(LINE))
            return [(rows.at[pl.ds(first, plan.lines)], slot)]
        first = self.index * plan.width + self.start(chunk)
        return [(rows.at[pl.ds(first + line * LINE, LINE)], slot.at[line]) for line in range(plan.lines)]

    def fetch(self, chunk: jax.Array) -> None:
        barrier = self.arrived.at[self.slot(chunk)]
        for source, target in self.copies(self.scores, chunk):
            plgpu.copy_gmem_to_smem(source, target, barrier)

    def fetch_first(self) -> None:
        _loop(self.plan.slots, lambda chunk, _: self.fetch(chunk), None)

    def fetch_after(self, chunk: jax.Array) -> None:
        """The chunk that takes the place of ``chunk``, if there is one."""
        following = chunk + self.plan.slots
        pl.when((chunk >= 0) & (following < self.plan.chunks))(lambda: self.fetch(following))

    def fold(self, step: Callable[[Carry, jax.Array], Carry], carry: Carry, *, arriving: bool = False) -> Carry:
        """``step(carry, block)`` over the row in float32 blocks [plan.block, LINE].

        Columns that a block shares with one before it are -inf. ``arriving`` says that the row has been sent for and
        not yet waited for; a row that stays is waited for only then, any other is sent for anew.
        """
        plan = self.plan
        if not plan.stays and not arriving:
            self.fetch_first()

        def over_chunk(chunk: jax.Array, carry: Carry) -> Carry:
            if arriving or not plan.stays:
                plgpu.barrier_wait(self.arrived.at[self.slot(chunk)])
            over_block = lambda block, carry: step(carry, self._new(chunk, block))  # noqa: E731
            carry = _loop(plan.lines // plan.block, over_block, carry)
            if not plan.stays:
                plgpu.commit_smem()  # all have read the chunk before a copy takes its place
                self.fetch_after(chunk)
            return carry

        return _loop(plan.chunks, over_chunk, carry)

    def _new(self, chunk: jax.Array, block: jax.Array) -> jax.Array:
        plan, first = self.plan, block * self.plan.block
        z = self.slots[self.slot(chunk), pl.ds(first, plan.block)].astype(jnp.float32)
        if plan.overlap == 0:
            return z
        line, lane = (lax.broadcasted_iota(jnp.int32, z.shape, axis) for axis in (0, 1))
        seen = jnp.where(chunk == plan.chunks - 1, plan.overlap - first * LINE, 0)
        return jnp.where(line * LINE + lane < seen, -jnp.inf, z)

    def replace(self, function: Callable[[jax.Array], jax.Array], result: Any) -> None:
        """``function`` of every score into ``result``, which is laid out like the scores."""
        plan = self.plan
        if not plan.stays:
            self.fetch_first()

        def over_chunk(chunk: jax.Array, _: None) -> None:
            if not plan.stays:
                plgpu.barrier_wait(self.arrived.at[self.slot(chunk)])
            if plan.in_lines:
                self._send(function, result, chunk)
            else:
                self._store(function, result, chunk)

        _loop(plan.chunks, over_chunk, None)
        if plan.in_lines:
            plgpu.wait_smem_to_gmem(0)

    def _send(self, function: Callable[[jax.Array], jax.Array], result: Any, chunk: jax.Array) -> None:
        """``chunk`` is replaced in its slot and copied out of there."""
        plan = self.plan

        def over_block(block: jax.Array, _: None) -> None:
            place = self.slot(chunk), pl.ds(block * plan.block, plan.block)
            z = self.slots[place]
            self.slots[place] = function(z.astype(jnp.float32)).astype(z.dtype)

        _loop(plan.lines // plan.block, over_block, None)
        plgpu.commit_smem()
        if plan.overlap:  # the last chunk writes again what the one before it wrote
            pl.when(chunk == plan.chunks - 1)(lambda: plgpu.wait_smem_to_gmem(0))
        [(target, source)] = self.copies(result, chunk)
        plgpu.copy_smem_to_gmem(source, target)
        if not plan.stays:  # all but the copy just begun have left their slots
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            self.fetch_after(chunk - 1)

    def _store(self, function: Callable[[jax.Array], jax.Array], result: Any, chunk: jax.Array) -> None:
        """``chunk`` is stored from registers, one column to a thread: copies start only at multiples of 16 bytes."""
        slot, first = self.slot(chunk), self.index * self.plan.width + self.start(chunk)

        def over_piece(piece: jax.Array, _: None) -> None:
            half = pl.ds(lax.rem(piece, np.int32(2)) * _THREADS, _THREADS)
            z = self.slots[slot, lax.div(piece, np.int32(2)), half]
            result[pl.ds(first + piece * _THREADS, _THREADS)] = function(z.astype(jnp.float32)).astype(z.dtype)

        _loop(self.plan.columns // _THREADS, over_piece, None)
        if not self.plan.stays:
            plgpu.commit_smem()
            self.fetch_after(chunk)


def solve(z: jax.Array, plan: Plan, *, project: bool, interpret: Any = None) -> Any:
    """Of rows z [B, M], B >= 1, cut as planned: with ``project`` p [B, M], without it (top, tau, count), each [B].

    ``interpret`` is None, or the parameters of the interpreter that stands in for a GPU.
    """
    rows, width = z.shape
    flat = (rows * width // LINE, LINE) if plan.in_lines else (rows * width,)
    scalars = tuple(jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32))
    call = plgpu.kernel(
        partial(_kernel, plan),
        out_type=jax.ShapeDtypeStruct(flat, z.dtype) if project else scalars,
        grid=(rows,),
        grid_names=("row",),
        scratch_types={
            "slots": plgpu.SMEM((plan.slots, plan.lines, LINE), z.dtype),
            "arrived": plgpu.Barrier(num_arrivals=1 if plan.in_lines else plan.lines, num_barriers=plan.slots),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="sparsemax" if project else "sparsemax_threshold",
        interpret=interpret,
    )
    out = call(z.reshape(flat))
    axes = tuple(jax.typeof(z).manual_axis_type.varying)  # those of shard_map, which a kernel leaves out of its results
    if axes:
        out = lax.pcast(out, axes, to="varying")
    return out.reshape(z.shape) if project else out


def _kernel(plan: Plan, scores: Any, *results: Any, slots: Any, arrived: Any) -> None:
    row = _Row(plan, lax.axis_index("row"), scores, slots, arrived)
    row.fetch_first()
    lowest = jnp.full((plan.block, LINE), -jnp.inf, jnp.float32)
    maxima = row.fold(jnp.maximum, lowest, arriving=True)
    top = jnp.max(maxima)
    below, _ = _newton(lambda tau: _summed(_add((maxima - top) - tau, _zeros(maxima))), jnp.float32(-1))
    # Rounding must not push the start above the threshold: f >= 0 there keeps Newton monotone.
    start = jnp.maximum(below - 8 * np.finfo(np.float32).eps, jnp.float32(-1))
    sweep = lambda tau: row.fold(lambda sums, z: _add((z - top) - tau, sums), _zeros(maxima))  # noqa: E731
    tau, count = _newton(lambda tau: _summed(sweep(tau)), start)
    if len(results) == 1:
        row.replace(lambda z: _positive((z - top) - tau), results[0])
    else:
        for result, value in zip(results, (top, tau, jnp.where(tau == tau, count, 0).astype(jnp.int32)), strict=True):
            result[row.index] = value


def _newton(sums: Callable[[jax.Array], tuple], start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(tau, count) from the lower bound ``start``: the rules of ``xla._newton`` for one row.

    A row with NaN, with +inf or without a finite score has a sum of NaN, which ends the loop and is its tau.
    """

    def step(carry: tuple) -> tuple:
        sweeps, tau, count, _ = carry
        total, inside = sums(tau)
        higher = tau + (total - 1) / inside
        return sweeps + 1, higher, inside, (inside != count) & ((higher > tau) | (count < 0))

    begin = (np.int32(0), start, jnp.float32(-1), np.bool_(True))
    _, tau, count, _ = lax.while_loop(lambda carry: (carry[0] < _MAX_SWEEPS) & carry[3], step, begin)
    return tau, count


def _add(above: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return sums[0] + _positive(above), sums[1] + jnp.where(above > 0, 1.0, 0.0)


def _positive(above: jax.Array) -> jax.Array:
    """max(above, 0), which keeps NaN as ``max`` may not."""
    return jnp.where(above <= 0, 0.0, above)


def _zeros(like: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros_like(like), jnp.zeros_like(like)


def _summed(sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(sums[0]), jnp.sum(sums[1])


def _loop(count: int, body: Callable[[jax.Array, Carry], Carry], carry: Carry) -> Carry:
    """``lax.fori_loop`` from 0 whose counter is int32 also where integers are int64 by default."""
    return lax.fori_loop(0, count, lambda i, carry: body(i.astype(jnp.int32), carry), carry)
