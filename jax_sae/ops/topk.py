"""Selection of the largest scores: per row, and over a whole batch."""

import jax
import jax.numpy as jnp
from jax import lax

_NATIVE_ON_TPU = (128, 512)
MOST_WITHOUT_SORT = _NATIVE_ON_TPU[-1]


def top_k(z: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """``lax.top_k`` of rows [B, M]: (values, indices) [B, k].

    A TPU has it natively, in one read of the rows, for the 128 and the 512 largest alone; other numbers become a sort
    or a copy of the rows first. So as many are taken there, and the first k of them kept.
    """
    size = next((size for size in _NATIVE_ON_TPU if k <= size <= z.shape[-1]), k)
    taken = lambda z: tuple(found[:, :k] for found in lax.top_k(z, size))  # noqa: E731
    values, indices = lax.platform_dependent(z, tpu=taken, default=lambda z: tuple(lax.top_k(z, k)))
    return values, indices


def top_k_mask(z: jax.Array, k: int, keep: jax.Array | None = None) -> jax.Array:
    """The k largest entries of every row, or the ``keep`` largest of them.

    Args:
      z: [..., M] scores.
      k: 1 to M.
      keep: [] int, may be traced, so that one compiled program serves every number up to k; a larger one keeps k.

    Returns:
      [..., M] bool with exactly k (or ``keep``) True per row. Ties go to the lower index; NaN counts as the largest.
      A constant to differentiation.

    Raises:
      ValueError: k is out of range.
    """
    width = z.shape[-1]
    if not 1 <= k <= width:
        raise ValueError(f"k is {k} for rows of {width} scores; expected 1 <= k <= {width}")
    rows = lax.stop_gradient(z).reshape(-1, width)
    values, indices = top_k(rows, k)
    last = k - 1 if keep is None else jnp.clip(keep, 1, k) - 1
    value, column = (lax.dynamic_index_in_dim(found, last, axis=1) for found in (values, indices))
    keys, key = _ordered_integers(rows), _ordered_integers(value)
    before = jnp.arange(width, dtype=jnp.int32)[None, :] <= column  # of equal scores the first come first
    mask = (keys > key) | ((keys == key) & before)
    return (mask if keep is None else mask & (keep > 0)).reshape(z.shape)


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
    return _nth_largest(z, count, (0, 1), axis_name)[0, 0]


def top_k_threshold(z: jax.Array, k: int) -> jax.Array:
    """The k-th largest score of every row, exactly: :func:`batch_top_k_threshold` for each, for rows that are short.

    Args:
      z: [B, M] scores, computed in float32. NaN counts as the largest.
      k: 1 to M.

    Returns:
      [B] float32, a constant to differentiation.
    """
    return _nth_largest(z, k, (1,), None)[:, 0]


def _nth_largest(z: jax.Array, n: int | jax.Array, axes: tuple[int, ...], axis_name: str | None) -> jax.Array:
    """The n-th largest entry along ``axes``, which are kept with length 1."""
    keys = _ordered_integers(lax.stop_gradient(z))
    low, high = jnp.min(keys, axes, keepdims=True), jnp.max(keys, axes, keepdims=True)
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
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    threshold, _ = lax.while_loop(lambda bracket: jnp.any(bracket[0] < bracket[1]), halve, (low, high))
    return _floats(threshold)


def _ordered_integers(z: jax.Array) -> jax.Array:
    """float32 to int32 of the same order; -0.0 comes just before 0.0."""
    bits = lax.bitcast_convert_type(z.astype(jnp.float32), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _floats(keys: jax.Array) -> jax.Array:
    """The inverse of :func:`_ordered_integers`."""
    return lax.bitcast_convert_type(keys ^ ((keys >> 31) & 0x7FFFFFFF), jnp.float32)
