"""Where the few True entries of long rows are, without a sort and without a scatter."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jax_sae.ops.largest import MOST_WITHOUT_SORT, top_k

_BITS = 32
_EXACT = 1 << 24  # float32 holds every whole number up to it
_AT_ONCE = 64  # places that are looked for together


def compact(mask: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The places of the True entries of every row.

    Args:
      mask: [B, M] bool.
      k: places per row, at least 1.

    Returns:
      indices: [B, k] int32, each True column once, the used places first, in no particular order; M in the others.
      count: [B] int32, True entries of the row. Where it is above k, only k of them have a place.
    """
    on_tpu = _by_top_k if k <= MOST_WITHOUT_SORT and mask.shape[-1] <= _EXACT else _by_words
    return lax.platform_dependent(mask, tpu=partial(on_tpu, k=k), default=partial(_by_words, k=k))


def _by_top_k(mask: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The smallest columns, as float32 numbers."""
    width = mask.shape[-1]
    columns = jnp.arange(width, dtype=jnp.float32)[None, :]
    largest, _ = top_k(jnp.where(mask, -columns, -float(width)), min(k, width))
    padded = jnp.pad(largest, ((0, 0), (0, k - largest.shape[-1])), constant_values=-float(width))
    return -padded.astype(jnp.int32), jnp.sum(mask, axis=-1, dtype=jnp.int32)


def _by_words(mask: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """All but one pass over the mask works on a 32nd of the row, and for as many places as the fullest row needs.

    That pass packs it into words of 32 bits, word w holding the columns that are w modulo their number.
    """
    width, words = mask.shape[-1], _pack(mask)
    running = jnp.cumsum(lax.population_count(words), axis=-1, dtype=jnp.int32)
    count, size = running[:, -1], min(k, _AT_ONCE)

    def find(i: jax.Array, indices: jax.Array) -> jax.Array:
        places = i * size + jnp.arange(size, dtype=jnp.int32)
        return lax.dynamic_update_slice_in_dim(indices, _columns(words, running, places, width), i * size, axis=1)

    blocks = -(-k // size)
    none = jnp.zeros_like(running[:, :1]) + jnp.full((1, blocks * size), width, jnp.int32)
    needed = jnp.minimum(-(-jnp.max(count, initial=0) // size), blocks)
    return lax.fori_loop(0, needed, find, none)[:, :k], count


def _columns(words: jax.Array, running: jax.Array, places: jax.Array, width: int) -> jax.Array:
    """[B, n] int32 columns of the True entries with these numbers [n], ``width`` where there are fewer.

    The j-th is in the word in which the running count of bits passes j, and is found within it by halving.
    """
    place = _first_above(running, places)
    inside = place < words.shape[-1]
    place = jnp.minimum(place, words.shape[-1] - 1)
    word = jnp.take_along_axis(words, place, axis=-1)
    before = jnp.take_along_axis(running, place, axis=-1) - _ones(word)
    column = _nth_bit(word, places[None, :] - before) * words.shape[-1] + place
    return jnp.where(inside, column, width)


def _pack(mask: jax.Array) -> jax.Array:
    """[B, M] bool to [B, ceil(M / 32)] uint32; bit j of word w is column ``j * ceil(M / 32) + w``."""
    rows, width = mask.shape
    words = -(-width // _BITS)
    padded = jnp.pad(mask, ((0, 0), (0, words * _BITS - width))).reshape(rows, _BITS, words)
    bits = jnp.uint32(1) << jnp.arange(_BITS, dtype=jnp.uint32)
    # Not the mask as numbers, shifted: XLA would turn those in memory on a GPU.
    return jnp.sum(jnp.where(padded, bits[None, :, None], jnp.uint32(0)), axis=1, dtype=jnp.uint32)


def _first_above(ascending: jax.Array, values: jax.Array) -> jax.Array:
    """[B, k] int32: where in a row of ``ascending [B, W]`` the first entry above each of ``values [k]`` is, or W.

    By halving, all rows in step: ``jnp.searchsorted`` under ``vmap`` is the same, but for ``shard_map`` over some axes
    of a mesh, where it fails.
    """
    width = ascending.shape[-1]
    place = jnp.zeros_like(ascending[:, :1]) + jnp.zeros_like(values)[None, :]
    for power in reversed(range(width.bit_length())):
        further = place + (1 << power)
        last = jnp.take_along_axis(ascending, jnp.minimum(further, width) - 1, axis=-1)
        place = jnp.where((further <= width) & (last <= values[None, :]), further, place)
    return place


def _nth_bit(word: jax.Array, n: jax.Array) -> jax.Array:
    """Position of the n-th 1 of a word, counted from 0 and from the lowest bit."""
    position = jnp.zeros_like(n)
    for half in (16, 8, 4, 2, 1):
        low = _ones(word & jnp.uint32((1 << half) - 1))
        above = n >= low
        n = jnp.where(above, n - low, n)
        word = jnp.where(above, word >> half, word)
        position = position + jnp.where(above, half, 0)
    return position


def _ones(word: jax.Array) -> jax.Array:
    return lax.population_count(word).astype(jnp.int32)
