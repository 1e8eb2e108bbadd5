"""Where the few True entries of long rows are, without a sort and without a scatter."""

import jax
import jax.numpy as jnp
from jax import lax

_BITS = 32


def compact(mask: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The places of the True entries of every row.

    One pass over the mask packs it into words of 32 bits, word w holding the columns that are w modulo their number;
    all else works on a 32nd of the row. The j-th True entry is in the word in which the running count of bits passes
    j, and is found within it by halving.

    Args:
      mask: [B, M] bool.
      k: places per row, at least 1.

    Returns:
      indices: [B, k] int32, each True column once, in the order of the words; M in unused places.
      count: [B] int32, True entries of the row. Where it is above k, only the first k of them have a place.
    """
    width = mask.shape[-1]
    words = _pack(mask)
    running = jnp.cumsum(lax.population_count(words), axis=-1, dtype=jnp.int32)
    wanted = jnp.arange(k, dtype=jnp.int32)
    find = jax.vmap(lambda row: jnp.searchsorted(row, wanted, side="right"))
    place = find(running).astype(jnp.int32)
    inside = place < words.shape[-1]
    place = jnp.minimum(place, words.shape[-1] - 1)
    word = jnp.take_along_axis(words, place, axis=-1)
    before = jnp.take_along_axis(running, place, axis=-1) - _ones(word)
    column = _nth_bit(word, wanted[None, :] - before) * words.shape[-1] + place
    return jnp.where(inside, column, width), running[:, -1]


def _pack(mask: jax.Array) -> jax.Array:
    """[B, M] bool to [B, ceil(M / 32)] uint32; bit j of word w is column ``j * ceil(M / 32) + w``."""
    rows, width = mask.shape
    words = -(-width // _BITS)
    padded = jnp.pad(mask, ((0, 0), (0, words * _BITS - width))).reshape(rows, _BITS, words)
    bits = padded.astype(jnp.uint32) << jnp.arange(_BITS, dtype=jnp.uint32)[None, :, None]
    return jnp.sum(bits, axis=1, dtype=jnp.uint32)


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
