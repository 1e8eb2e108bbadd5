"""Selection of the largest scores: per row, and over a whole batch."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jax_sae.ops.compaction import compact
from jax_sae.ops.largest import MOST_WITHOUT_SORT, top_k
from jax_sae.ops.maxima import GROUPS, group_maxima

_MOST_FROM_MAXIMA = GROUPS * 3 // 4  # of more than these, too many scores reach the bound that maxima give
_FIRST_STEP = 1 << 20  # of keys: an eighth of a doubling of the score
_LARGEST_STEP = 1 << 29
_ROWS = 8

Selected = tuple[jax.Array, jax.Array]
Bracket = tuple[jax.Array, jax.Array, jax.Array]
Selector = Callable[[jax.Array, jax.Array, jax.Array], Selected]


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
    on_cpu = partial(_last_of_candidates, k=k, few=_last_of_few_by_halving, many=partial(_last_of_one_list, k=k))
    on_tpu = partial(_last_of_list, k=k) if k <= MOST_WITHOUT_SORT else _last_by_halving
    on_gpu = partial(_last_of_candidates, k=k, few=_last_of_few_by_sorting, many=_last_by_halving)
    key, column = lax.platform_dependent(rows, kept, cpu=on_cpu, tpu=on_tpu, default=on_gpu)
    keys = _ordered_integers(rows)
    before = _columns(rows) <= column
    mask = (keys > key) | ((keys == key) & before)
    return (mask if keep is None else mask & (keep > 0)).reshape(z.shape)


def _last_of_candidates(
    rows: jax.Array, n: jax.Array, *, k: int, few: Selector, many: Callable[[jax.Array, jax.Array], Selected]
) -> Selected:
    """([B, 1] key of the n-th largest entry, [B, 1] its column), n up to k; of equal entries the first are larger.

    At least k entries reach the k-th largest maximum of groups, and few others do: they are gathered, and ``few``
    finds it among these. ``many`` finds it in whole rows, where more reach it than are gathered.
    """
    maxima = group_maxima(rows)
    if maxima is rows:
        return few(_ordered_integers(rows), _columns(rows), n)
    if k > _MOST_FROM_MAXIMA:
        return many(rows, n)
    room = 2 * k + 64
    bound, _ = few(_ordered_integers(maxima), _columns(maxima), jnp.int32(k))
    columns, count = compact(_ordered_integers(rows) >= bound, room)
    scores = jnp.take_along_axis(rows, columns, axis=-1, mode="fill", fill_value=-jnp.inf)
    found = few(_ordered_integers(scores), columns, n)
    return lax.cond(jnp.any(count > room), many, lambda *_: found, rows, n)


def _last_of_few_by_halving(keys: jax.Array, columns: jax.Array, n: jax.Array) -> Selected:
    """The n-th largest of ``keys [B, n]`` with its entry in ``columns [B, n]``: between bounds that close in."""
    key = _nth_largest(keys, n, (1,))
    wanted = n - jnp.sum(keys > key, 1, keepdims=True, dtype=jnp.int32)
    tied = jnp.where(keys == key, columns, jnp.iinfo(jnp.int32).max)
    return key, -_nth_largest(-tied, wanted, (1,))


def _last_of_few_by_sorting(keys: jax.Array, columns: jax.Array, n: jax.Array) -> Selected:
    """As :func:`_last_of_few_by_halving`. On GPUs a sort of short rows is one kernel, a loop waits for the host."""
    columns = jnp.broadcast_to(columns, keys.shape)
    descending, columns = lax.sort((~keys, columns), dimension=1, num_keys=2)
    key, column = (lax.dynamic_index_in_dim(found, n - 1, axis=1) for found in (descending, columns))
    return ~key, column


def _last_of_list(rows: jax.Array, n: jax.Array, k: int) -> Selected:
    """As :func:`_last_of_candidates`, from the k largest in order."""
    # The barrier keeps XLA from making these the n-th of a sort of the whole rows.
    values, indices = lax.optimization_barrier(top_k(rows, k))
    value, column = (lax.dynamic_index_in_dim(found, n - 1, axis=1) for found in (values, indices))
    return _ordered_integers(value), column


def _last_of_one_list(rows: jax.Array, n: jax.Array, k: int) -> Selected:
    """:func:`_last_of_list` whose NaN all come first; it writes a copy of the rows."""
    return _last_of_list(_with_one_nan(rows), n, k)


def _last_by_halving(rows: jax.Array, n: jax.Array) -> Selected:
    """As :func:`_last_of_candidates` in sweeps; the key may be a smaller one that no other entry reaches."""
    keys, maxima = _ordered_integers(rows), _ordered_integers(group_maxima(rows))
    bound = _nth_largest(maxima, jnp.minimum(n, maxima.shape[-1]), (1,))  # where there are n: as many scores reach it
    low = jnp.where(n <= maxima.shape[-1], bound, jnp.min(keys, 1, keepdims=True))
    key = _nth_largest(keys, n, (1,), low=low, exact=False)
    tied = keys == key
    wanted = n - jnp.sum(keys > key, 1, keepdims=True, dtype=jnp.int32)
    columns = _columns(rows)

    def halve(bracket: Selected) -> Selected:
        """Keeps: fewer than ``wanted`` are tied in columns < low, enough in columns <= high."""
        low, high = bracket
        middle = (low + high) // 2
        enough = jnp.sum(tied & (columns <= middle), 1, keepdims=True, dtype=jnp.int32) >= wanted
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    last = jnp.full_like(wanted, rows.shape[-1] - 1)
    all_wanted = jnp.sum(tied, 1, keepdims=True, dtype=jnp.int32) == wanted
    unfinished = lambda bracket: jnp.any(bracket[0] < bracket[1])  # noqa: E731
    return key, lax.while_loop(unfinished, halve, (jnp.where(all_wanted, last, 0), last))[1]


def batch_top_k_threshold(z: jax.Array, count: int | jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """The ``count``-th largest of all scores of a batch, exactly.

    By bisection on the integers whose order is that of the floats, in counting sweeps that need neither a sort nor a
    gather, so the batch may be split over devices. It starts at a close lower bound, from maxima of groups, and takes
    10 to 20 sweeps.

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
    return _nth_of_batch(lax.stop_gradient(z).astype(jnp.float32), jnp.asarray(count, jnp.int32), axis_name)


def _nth_of_batch(z: jax.Array, n: jax.Array, axis_name: str | None) -> jax.Array:
    """[] the n-th largest of all."""
    over_devices = lambda reduce, x: x if axis_name is None else reduce(x, axis_name)  # noqa: E731
    groups = group_maxima(z)
    maxima = _ordered_integers(groups)
    of_maxima = over_devices(lax.psum, jnp.int32(maxima.size))
    bound = _nth_largest(maxima, jnp.minimum(n, of_maxima), (0, 1), axis_name)[0, 0]
    if groups is z:
        return _floats(bound)
    low = jnp.where(n <= of_maxima, bound, _ordered_integers(jnp.float32(-jnp.inf)))
    high = over_devices(lax.pmax, jnp.max(maxima))

    def narrow(carry: Bracket) -> Bracket:
        """Keeps: at least n are >= low, fewer are > high. Until high is found, steps from low double."""
        low, high, step = carry
        pivot = low + jnp.minimum(_middle(low, high) - low, step)
        reached = over_devices(lax.psum, lax.platform_dependent(z, pivot, cpu=_count_by_rows, default=_count))
        low = jnp.where(reached >= n, pivot, low)
        high = jnp.where(reached > n, high, pivot - 1)  # at n, below low: nothing between them is wanted then
        return low, high, jnp.minimum(step, _LARGEST_STEP) * 2

    first = jnp.zeros_like(low) + _FIRST_STEP
    low, _, _ = lax.while_loop(lambda carry: carry[0] < carry[1], narrow, (low, high, first))
    kept = jnp.where(_ordered_integers(z) >= low, z, jnp.inf)
    return over_devices(lax.pmin, jnp.min(kept))


def _count(z: jax.Array, key: jax.Array) -> jax.Array:
    """[] how many scores have a key of at least this one."""
    return jnp.sum(_ordered_integers(z) >= key, dtype=jnp.int32)


def _count_by_rows(z: jax.Array, key: jax.Array) -> jax.Array:
    """:func:`_count` as a loop over a few rows at a time, which XLA vectorises on a CPU as it does not a reduction."""
    whole = len(z) // _ROWS * _ROWS

    def add(i: jax.Array, counts: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(z, i * _ROWS, _ROWS)
        return counts + (_ordered_integers(rows) >= key)

    counts = jnp.zeros_like(z[:_ROWS], jnp.int32)
    in_blocks = jnp.sum(lax.fori_loop(0, len(z) // _ROWS, add, counts)) if whole else 0
    return in_blocks + _count(z[whole:], key)


def top_k_threshold(z: jax.Array, k: int) -> jax.Array:
    """The k-th largest score of every row, exactly: :func:`batch_top_k_threshold` for each, for rows that are short.

    Args:
      z: [B, M] scores, computed in float32. NaN counts as the largest.
      k: 1 to M.

    Returns:
      [B] float32, a constant to differentiation.
    """
    keys = _ordered_integers(lax.stop_gradient(z).astype(jnp.float32))
    halved, sorted_ = (partial(few, n=jnp.int32(k)) for few in (_last_of_few_by_halving, _last_of_few_by_sorting))
    key, _ = lax.platform_dependent(keys, _columns(keys), cpu=halved, tpu=halved, default=sorted_)
    return _floats(key)[:, 0]


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
        middle = _middle(low, high)
        reached = jnp.sum(keys >= middle, axes, keepdims=True, dtype=jnp.int32)
        if axis_name is not None:
            reached = lax.psum(reached, axis_name)
        enough = reached >= n
        low, high = jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)
        return low, high if exact else jnp.where(reached == n, low, high)

    return lax.while_loop(lambda bracket: jnp.any(bracket[0] < bracket[1]), halve, (low, high))[0]


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
    """The mean, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


def _columns(rows: jax.Array) -> jax.Array:
    """[1, M] int32, the number of every column."""
    return jnp.arange(rows.shape[-1], dtype=jnp.int32)[None, :]


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
