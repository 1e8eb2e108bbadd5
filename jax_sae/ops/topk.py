"""Selection of the largest scores: per row, and over a whole batch."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from jax_sae.ops.maxima import group_maxima

_NATIVE_ON_TPU = (128, 512)
MOST_WITHOUT_SORT = _NATIVE_ON_TPU[-1]


def top_k(z: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """``lax.top_k`` of rows [B, M]: (values, indices) [B, k].

    A TPU has it natively, in one read of the rows, for the 128 and the 512 largest alone; other numbers become a sort
    or a copy of the rows first. So as many are taken there, and the first k of them kept. The barrier keeps the
    compiler from making them the k largest again, the layout from turning the rows to suit what is kept.
    """
    size = next((size for size in _NATIVE_ON_TPU if k <= size <= z.shape[-1]), k)

    def taken(z: jax.Array) -> tuple[jax.Array, ...]:
        found = tuple(with_layout_constraint(found, Layout((0, 1))) for found in lax.top_k(z, size))
        return tuple(found[:, :k] for found in lax.optimization_barrier(found))

    values, indices = lax.platform_dependent(z, tpu=taken, default=lambda z: tuple(lax.top_k(z, k)))
    return values, indices


def top_k_mask(z: jax.Array, k: int, keep: jax.Array | None = None) -> jax.Array:
    """The k largest entries of every row, or the ``keep`` largest of them.

    Args:
      z: [..., M] scores.
      k: 1 to M.
      keep: [] int, may be traced, so that one compiled program serves every number up to k; a larger one keeps k.

    Returns:
      [..., M] bool with exactly k (or ``keep``) True per row. Ties go to the lower index; NaN counts as the largest,
      and on TPUs a row that holds one may keep more. A constant to differentiation.

    Raises:
      ValueError: k is out of range.
    """
    width = z.shape[-1]
    if not 1 <= k <= width:
        raise ValueError(f"k is {k} for rows of {width} scores; expected 1 <= k <= {width}")
    rows = lax.stop_gradient(z).reshape(-1, width)
    kept = jnp.int32(k) if keep is None else jnp.clip(jnp.asarray(keep, jnp.int32), 1, k)
    listed = partial(_last_of_list, k=k)
    on_cpu = lambda rows, n: listed(_with_one_nan(rows), n)  # noqa: E731
    on_tpu = listed if k <= MOST_WITHOUT_SORT else _last_by_halving  # the rows as they are: no copy of them is written
    key, column = lax.platform_dependent(rows, kept, cpu=on_cpu, tpu=on_tpu, default=_last_by_halving)
    keys = _ordered_integers(rows)
    before = jnp.arange(width, dtype=jnp.int32)[None, :] <= column
    mask = (keys > key) | ((keys == key) & before)
    return (mask if keep is None else mask & (keep > 0)).reshape(z.shape)


def _last_of_list(rows: jax.Array, n: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """([B, 1] key of the n-th largest entry, [B, 1] its column), n up to k; of equal entries the first are larger."""
    values, indices = top_k(rows, k)
    value, column = (lax.dynamic_index_in_dim(found, n - 1, axis=1) for found in (values, indices))
    return _ordered_integers(value), column


def _last_by_halving(rows: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As :func:`_last_of_list` in sweeps, without a sort; the key may be a smaller one that no other entry reaches."""
    width, keys, maxima = rows.shape[-1], _ordered_integers(rows), _ordered_integers(group_maxima(rows))
    bound = _nth_largest(maxima, jnp.minimum(n, maxima.shape[-1]), (1,))  # where there are n: as many scores reach it
    low = jnp.where(n <= maxima.shape[-1], bound, jnp.min(keys, 1, keepdims=True))
    key = _nth_largest(keys, n, (1,), low=low, exact=False)
    tied = keys == key
    wanted = n - jnp.sum(keys > key, 1, keepdims=True, dtype=jnp.int32)
    columns = jnp.arange(width, dtype=jnp.int32)[None, :]

    def halve(bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Keeps: fewer than ``wanted`` are tied in columns < low, enough in columns <= high."""
        low, high = bracket
        middle = (low + high) // 2
        enough = jnp.sum(tied & (columns <= middle), 1, keepdims=True, dtype=jnp.int32) >= wanted
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    last = jnp.full_like(wanted, width - 1)
    all_wanted = jnp.sum(tied, 1, keepdims=True, dtype=jnp.int32) == wanted
    unfinished = lambda bracket: jnp.any(bracket[0] < bracket[1])  # noqa: E731
    return key, lax.while_loop(unfinished, halve, (jnp.where(all_wanted, last, 0), last))[1]


def batch_top_k_threshold(z: jax.Array, count: int | jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """The ``count``-th largest of all scores of a batch, exactly.

    By bisection on the integers whose order is that of the floats: at most 32 counting sweeps, which need
    neither a sort nor a gather, so the batch may be split over devices.

    Args:
      z: [B, M] scores without NaN; this device's rows when ``axis_name`` is given. Computed in float32.
      count: 1 to the number of scores in the whole batch; [] int32 may be traced, and is then not checked.
      axis_name: the mapped axis that the batch is split over.

    Returns:
      [] float32. ``z >= threshold`` keeps ``count`` scores, and more where scores tie with the threshold.
      A constant to differentiation.

    Raises:
      ValueError: ``count``, a Python integer, is out of range.
    """
    total = z.size * (1 if axis_name is None else lax.axis_size(axis_name))
    if isinstance(count, int) and not 1 <= count <= total:
        raise ValueError(f"count is {count} for a batch of {total} scores; expected 1 <= count <= {total}")
    keys = _ordered_integers(lax.stop_gradient(z).astype(jnp.float32))
    return _floats(_nth_largest(keys, count, (0, 1), axis_name))[0, 0]


def top_k_threshold(z: jax.Array, k: int) -> jax.Array:
    """The k-th largest score of every row, exactly: :func:`batch_top_k_threshold` for each, for rows that are short.

    Args:
      z: [B, M] scores, computed in float32. NaN counts as the largest.
      k: 1 to M.

    Returns:
      [B] float32, a constant to differentiation.
    """
    keys = _ordered_integers(lax.stop_gradient(z).astype(jnp.float32))
    return _floats(_nth_largest(keys, k, (1,)))[:, 0]


def _nth_largest(
    keys: jax.Array,
    n: int | jax.Array,
    axes: tuple[int, ...],
    axis_name: str | None = None,
    *,
    low: jax.Array | None = None,
    exact: bool = True,
) -> jax.Array:
    """The n-th largest of the keys along ``axes``, which are kept with length 1.

    Args:
      keys: of :func:`_ordered_integers`.
      n: 1 to the number of keys.
      axes: that are searched together.
      axis_name: a mapped axis that is searched with them.
      low: a lower bound, if one is known.
      exact: whether it has to be one of the keys, or may be anything that n keys reach and no more; that takes fewer
        sweeps.
    """
    low, high = jnp.min(keys, axes, keepdims=True) if low is None else low, jnp.max(keys, axes, keepdims=True)
    if axis_name is not None:
        low, high = lax.pmin(low, axis_name), lax.pmax(high, axis_name)

    def halve(bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Keeps: at least ``n`` keys are >= low, fewer are > high."""
        low, high = bracket
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, without overflow
        reached = jnp.sum(keys >= middle, axes, keepdims=True, dtype=jnp.int32)
        if axis_name is not None:
            reached = lax.psum(reached, axis_name)
        enough = reached >= n
        low, high = jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)
        return low, high if exact else jnp.where(reached == n, low, high)

    return lax.while_loop(lambda bracket: jnp.any(bracket[0] < bracket[1]), halve, (low, high))[0]


def _ordered_integers(z: jax.Array) -> jax.Array:
    """Floats to integers of the same order, of 64 bits for float64 and else 32; -0.0 is below 0.0, NaN the largest."""
    z = _with_one_nan(z.astype(jnp.promote_types(z.dtype, jnp.float32)))
    limits = jnp.iinfo(jnp.int64 if z.dtype == jnp.float64 else jnp.int32)
    bits = lax.bitcast_convert_type(z, limits.dtype)
    return bits ^ ((bits >> (limits.bits - 1)) & limits.max)


def _floats(keys: jax.Array) -> jax.Array:
    """The inverse of :func:`_ordered_integers`, for float32."""
    return lax.bitcast_convert_type(keys ^ ((keys >> 31) & 0x7FFFFFFF), jnp.float32)


def _with_one_nan(z: jax.Array) -> jax.Array:
    """A NaN that processors make of infinities may have a sign, and would come first of all then."""
    return jnp.where(jnp.isnan(z), jnp.nan, z)
