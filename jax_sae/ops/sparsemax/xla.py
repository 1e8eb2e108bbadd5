"""The threshold of sparsemax in plain JAX: the definition by sorting, and Newton's method without a sort.

Both take rows ``z [B, M]`` of float32 or float64 with M >= 1 and give ``(top [B, 1], tau [B, 1], count [B, 1])``: the
row maximum, the threshold relative to it, and the size of the support (int32), so that
``p = max(z - top - tau, 0)``. Differences are formed after the maximum is subtracted, which keeps rows with a large
offset exact. Entries of -inf have p = 0. A row with NaN, with +inf or with nothing but -inf has a NaN threshold.
With ``axis_name`` the columns are sharded over that mapped axis.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Threshold = tuple[jax.Array, jax.Array, jax.Array]
Sums = tuple[jax.Array, jax.Array]
Sweep = Callable[[jax.Array, jax.Array, jax.Array], Sums]

_GROUPS = 1024  # maxima of strided groups that the warm start is computed from
_CHUNK = 128  # columns per step of the loop that XLA:CPU vectorises
_MAX_SWEEPS = 100


def sort_threshold(z: jax.Array, axis_name: str | None = None) -> Threshold:
    """The definition: Martins and Astudillo 2016 (arXiv 1602.02068), Algorithm 1, by sorting."""
    if axis_name is not None:
        z = lax.all_gather(z, axis_name, axis=1, tiled=True)
    top = jnp.max(z, axis=-1, keepdims=True)
    descending = -jnp.sort(-(z - top), axis=-1)
    finite = jnp.where(jnp.isneginf(descending), 0, descending)
    rank = jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype)[None, :]
    candidates = (jnp.cumsum(finite, axis=-1) - 1) / rank
    inside = (descending > candidates) & ~jnp.isneginf(descending)
    count = jnp.sum(inside, axis=-1, keepdims=True, dtype=jnp.int32)
    tau = jnp.take_along_axis(candidates, jnp.maximum(count - 1, 0), axis=-1)
    if axis_name is not None:  # equal on all devices, and now known to be
        top, tau, count = lax.pmax((top, tau, count), axis_name)
    return top, _nan_where_undefined(tau, z, top, axis_name), count


def newton_threshold(z: jax.Array, axis_name: str | None = None) -> Threshold:
    """Newton's method (Michelot 1986) on f(tau) = sum max(z - tau, 0) - 1, from the left.

    It starts from the threshold of a subset of the row, the maxima of strided groups: a lower bound of the
    row's own that leaves two to four sweeps over the row instead of about ten. On CPU a sweep is a loop over
    column chunks, which XLA vectorises there as it does not the plain reduction.
    """
    maxima = _group_maxima(z)
    top = jnp.max(maxima, axis=-1, keepdims=True)
    if axis_name is not None:
        top = lax.pmax(top, axis_name)
    anchor = jnp.where(jnp.isfinite(top), top, 0)  # a row with an infinite maximum has no threshold anyway

    def solve(sweep: Sweep) -> Sums:
        below, _ = _newton(partial(sweep, maxima, anchor), jnp.full_like(top, -1), axis_name)
        # Rounding must not push the start above the threshold: f >= 0 there keeps Newton monotone.
        start = jnp.maximum(below - 8 * jnp.finfo(z.dtype).eps, -1)
        return _newton(partial(sweep, z, anchor), start, axis_name)

    tau, count = lax.platform_dependent(cpu=lambda: solve(_chunked_sums), default=lambda: solve(_plain_sums))
    return top, _nan_where_undefined(tau, z, top, axis_name), count.astype(jnp.int32)


def _newton(sums: Callable[[jax.Array], Sums], start: jax.Array, axis_name: str | None) -> Sums:
    """(tau [B, 1], count [B, 1]) from the lower bound ``start``; ``sums(tau)`` is one sweep over the rows.

    A row is done when its count stays the same or its tau no longer rises: the second rule ends the cycles
    that rounding can make of the first alone.
    """

    def step(carry: tuple) -> tuple:
        sweeps, tau, count, _ = carry
        total, new_count = sums(tau)
        if axis_name is not None:
            total, new_count = lax.psum((total, new_count), axis_name)
        new_tau = tau + (total - 1) / new_count
        moving = (new_count != count) & ((new_tau > tau) | (count < 0))
        return sweeps + 1, new_tau, new_count, jnp.any(moving)

    begin = step((0, start, jnp.full_like(start, -1), True))
    _, tau, count, _ = lax.while_loop(lambda carry: (carry[0] < _MAX_SWEEPS) & carry[3], step, begin)
    return tau, count


def _plain_sums(z: jax.Array, anchor: jax.Array, tau: jax.Array) -> Sums:
    """Sum max(z - anchor - tau, 0) and the number of positive terms, each [B, 1], as two reductions."""
    above = (z - anchor) - tau
    total = jnp.sum(jnp.maximum(above, 0), axis=-1, keepdims=True)
    return total, jnp.sum(above > 0, axis=-1, keepdims=True, dtype=z.dtype)


def _chunked_sums(z: jax.Array, anchor: jax.Array, tau: jax.Array) -> Sums:
    """:func:`_plain_sums` as a loop over chunks of columns, with one accumulator per column of a chunk."""
    chunks, rest = divmod(z.shape[-1], _CHUNK)
    if chunks < 2:
        return _plain_sums(z, anchor, tau)

    def add(i: jax.Array, sums: Sums) -> Sums:
        above = (lax.dynamic_slice_in_dim(z, i * _CHUNK, _CHUNK, axis=1) - anchor) - tau
        return sums[0] + jnp.maximum(above, 0), sums[1] + (above > 0).astype(z.dtype)

    zeros = jnp.zeros_like(z[:, :_CHUNK])
    total, count = lax.fori_loop(0, chunks, add, (zeros, zeros))
    total, count = total.sum(-1, keepdims=True), count.sum(-1, keepdims=True)
    if rest:
        last = _plain_sums(z[:, chunks * _CHUNK :], anchor, tau)
        total, count = total + last[0], count + last[1]
    return total, count


def _group_maxima(z: jax.Array) -> jax.Array:
    """[B, M] to [B, _GROUPS] maxima of the columns that are equal modulo _GROUPS; short rows as they are."""
    rows, width = z.shape
    whole, rest = divmod(width, _GROUPS)
    if whole < 2:
        return z
    maxima = jnp.max(z[:, : whole * _GROUPS].reshape(rows, whole, _GROUPS), axis=1)
    if rest:
        tail = jnp.pad(z[:, whole * _GROUPS :], ((0, 0), (0, _GROUPS - rest)), constant_values=-jnp.inf)
        maxima = jnp.maximum(maxima, tail)
    return maxima


def _nan_where_undefined(tau: jax.Array, z: jax.Array, top: jax.Array, axis_name: str | None) -> jax.Array:
    """NaN for rows without a threshold. ``max`` may drop NaN on CPU, so NaN is looked for in the row."""
    nan = jnp.any(jnp.isnan(z), axis=-1, keepdims=True)
    if axis_name is not None:
        nan = lax.psum(nan.astype(jnp.int32), axis_name) > 0
    return jnp.where(nan | ~jnp.isfinite(top), jnp.nan, tau)
