"""Sparsemax in plain JAX: the definition by sorting, and Newton's method without a sort."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jax_sae.ops.compaction import compact
from jax_sae.ops.maxima import group_maxima
from jax_sae.ops.sparsemax.solver import Solver, Threshold, compute_dtype

Sums = tuple[jax.Array, jax.Array]
Sweep = Callable[[jax.Array, jax.Array, jax.Array], Sums]

_CHUNK = 128  # columns per step of the loop that XLA:CPU vectorises
_GATHERED = (64, 512)  # scores of a row that are gathered on CPU: one in _ONE_IN, from so many to so many
_ONE_IN = 32
_MAX_SWEEPS = 100


def sort_threshold(z: jax.Array, axis_name: str | None = None) -> Threshold:
    """The definition: Martins and Astudillo 2016 (arXiv 1602.02068), Algorithm 1, by sorting."""
    z = z.astype(compute_dtype(z))
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
    undefined = jnp.any(jnp.isnan(z), axis=-1, keepdims=True) | ~jnp.isfinite(top)  # max may drop NaN on CPU
    found = top, jnp.where(undefined, 0, tau), jnp.where(undefined, 0, count)
    if axis_name is not None:  # equal everywhere already; the maximum, which may drop NaN too, tells shard_map so
        found = lax.pmax(found, axis_name)
    top, tau, count = found
    return top, jnp.where(count == 0, jnp.nan, tau), count


def newton_threshold(z: jax.Array, axis_name: str | None = None) -> Threshold:
    """Newton's method (Michelot 1986) on f(tau) = sum max(z - tau, 0) - 1, from the left.

    It starts from the threshold of a subset of the row, the maxima of strided groups: a lower bound of the
    row's own that leaves two to four sweeps over the row instead of about ten.

    On CPU the scores above that bound, a few more than the support, are gathered first, and Newton's method goes over
    these alone; only rows with more of them than are gathered are swept whole. A sweep is a loop over chunks of
    columns, which XLA vectorises there as it does not the plain reduction. On GPUs short rows, the maxima among them,
    are sorted: that is one kernel, and a loop waits for the host in every step.
    """
    ways = {platform: partial(solve, axis_name=axis_name) for platform, solve in BY_PLATFORM.items()}
    return lax.platform_dependent(z, **ways)


def _solve(z: jax.Array, axis_name: str | None, *, sweep: Sweep, gather: bool = False, sort: bool = False) -> Threshold:
    """``gather`` and ``sort`` are for whole rows, and do nothing with ``axis_name``."""
    gather, sort = gather and axis_name is None, sort and axis_name is None
    dtype = compute_dtype(z)
    maxima = group_maxima(z)
    if sort and maxima is z:
        return sort_threshold(z)
    top = jnp.max(maxima, axis=-1, keepdims=True).astype(dtype)
    if axis_name is not None:
        top = lax.pmax(top, axis_name)
    anchor = jnp.where(jnp.isfinite(top), top, 0)  # a row with an infinite maximum has no threshold anyway
    start, found, open_rows = jnp.full_like(top, -1), None, jnp.full_like(top, True, dtype=bool)
    if maxima is not z:
        if sort:
            _, below, _ = sort_threshold(maxima)
        else:
            below, _ = _newton(partial(sweep, maxima, anchor), start, axis_name, open_rows)
        # Rounding must not push the start above the threshold: f >= 0 there keeps Newton monotone.
        start = jnp.maximum(below - 8 * jnp.finfo(dtype).eps, start)
        if gather:
            found, open_rows = _solve_gathered(z, anchor, start)
    tau, count = _newton(partial(sweep, z, anchor), start, axis_name, open_rows)
    if found is not None:
        tau, count = jnp.where(open_rows, tau, found[0]), jnp.where(open_rows, count, found[1])
    undefined = jnp.isnan(tau) | ~jnp.isfinite(top)
    return top, jnp.where(undefined, jnp.nan, tau), jnp.where(undefined, 0, count.astype(jnp.int32))


def _solve_gathered(z: jax.Array, anchor: jax.Array, start: jax.Array) -> tuple[Sums, jax.Array]:
    """((tau, count), [B, 1] bool the rows that were too full), from the scores above the lower bound ``start``.

    NaN counts as above, so that a row that holds one ends with NaN.
    """
    above = ~((z.astype(anchor.dtype) - anchor) - start <= 0)
    width, (fewest, most) = z.shape[-1], _GATHERED
    indices, count = compact(above, min(max(fewest, width // _ONE_IN), most, width))
    scores = jnp.take_along_axis(z, indices, axis=-1, mode="fill", fill_value=-jnp.inf)
    full = count[:, None] > indices.shape[-1]
    return _newton(partial(_plain_sums, scores, anchor), start, None, jnp.full_like(full, True)), full


def _newton(sums: Callable[[jax.Array], Sums], start: jax.Array, axis_name: str | None, open_rows: jax.Array) -> Sums:
    """(tau [B, 1], count [B, 1]) from the lower bound ``start``; ``sums(tau)`` is one sweep over the rows.

    A row is done, and kept as it is, when its count stays the same or its tau no longer rises: rounding would
    make some rows go up and down for ever by the first rule alone. Rows that are not ``open_rows`` are done.
    """

    def step(carry: tuple) -> tuple:
        sweeps, tau, count, moving = carry
        total, new_count = sums(tau)
        if axis_name is not None:
            total, new_count = lax.psum((total, new_count), axis_name)
        new_tau = tau + (total - 1) / new_count
        still_moving = moving & (new_count != count) & ((new_tau > tau) | (count < 0))
        return sweeps + 1, jnp.where(moving, new_tau, tau), jnp.where(moving, new_count, count), still_moving

    begin = (0, start, jnp.full_like(start, -1), open_rows)
    _, tau, count, _ = lax.while_loop(lambda carry: (carry[0] < _MAX_SWEEPS) & jnp.any(carry[3]), step, begin)
    return tau, count


def _plain_sums(z: jax.Array, anchor: jax.Array, tau: jax.Array) -> Sums:
    """Sum max(z - anchor - tau, 0) and the number of positive terms, each [B, 1], as two reductions."""
    excess, inside = _excess(z, anchor, tau)
    return jnp.sum(excess, axis=-1, keepdims=True), jnp.sum(inside, axis=-1, keepdims=True)


def _chunked_sums(z: jax.Array, anchor: jax.Array, tau: jax.Array) -> Sums:
    """:func:`_plain_sums` as a loop over chunks of columns, with one accumulator per column of a chunk."""
    chunks, rest = divmod(z.shape[-1], _CHUNK)
    if chunks < 2:
        return _plain_sums(z, anchor, tau)

    def add(i: jax.Array, sums: Sums) -> Sums:
        excess, inside = _excess(lax.dynamic_slice_in_dim(z, i * _CHUNK, _CHUNK, axis=1), anchor, tau)
        return sums[0] + excess, sums[1] + inside

    zeros = jnp.zeros_like(z[:, :_CHUNK], dtype=anchor.dtype)
    total, count = lax.fori_loop(0, chunks, add, (zeros, zeros))
    total, count = total.sum(-1, keepdims=True), count.sum(-1, keepdims=True)
    if rest:
        last = _plain_sums(z[:, chunks * _CHUNK :], anchor, tau)
        total, count = total + last[0], count + last[1]
    return total, count


def _excess(z: jax.Array, anchor: jax.Array, tau: jax.Array) -> Sums:
    """max(z - anchor - tau, 0), which keeps NaN as ``max`` may not on CPU, and 1 where it is positive."""
    above = (z.astype(anchor.dtype) - anchor) - tau
    return jnp.where(above <= 0, 0, above), (above > 0).astype(anchor.dtype)


BY_PLATFORM = {
    "cpu": partial(_solve, sweep=_chunked_sums, gather=True),
    "tpu": partial(_solve, sweep=_plain_sums),
    "default": partial(_solve, sweep=_plain_sums, sort=True),
}
"""What :func:`newton_threshold` is on each platform; ``default`` is for GPUs."""


def _project_by(
    threshold: Callable[[jax.Array, str | None], Threshold], z: jax.Array, axis_name: str | None
) -> jax.Array:
    top, tau, _ = threshold(z, axis_name)
    return jnp.maximum((z.astype(top.dtype) - top) - tau, 0).astype(z.dtype)


SORT = Solver(sort_threshold, partial(_project_by, sort_threshold))
NEWTON = Solver(newton_threshold, partial(_project_by, newton_threshold))
