"""What is left of a matrix product whose other factor is nearly all zeros: sums and products over few rows of a table.

Every input has K places, each with the index of a row of the table or with none. Inputs differ in how many places they
use, so the places are worked through in blocks, as many for an input as it needs; :func:`plan_blocks` lists them.

The work has two forms. On a CPU the blocks are taken one after the other: their rows then fit in the cache, and nothing
as large as all rows together is ever written. Elsewhere all are taken at once.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of places that are in use.

    Attributes:
      indices: [N, S] int32 rows of the table; out of it where there is none.
      owner: [N] int32, the input that the block belongs to; B for blocks that are left over.
      slot: [N] int32, which of its blocks it is: places ``slot * S`` and on.
      first: [B] int32, number of the first block of an input.
      used: [B] int32, blocks of an input.
    """

    indices: jax.Array
    owner: jax.Array
    slot: jax.Array
    first: jax.Array
    used: jax.Array


def plan_blocks(indices: jax.Array, count: jax.Array, n_blocks: int | None = None) -> tuple[Blocks, jax.Array]:
    """Lists the blocks that hold the used places.

    Args:
      indices: [B, K] int32; the used places come first.
      count: [B] int32, how many are used.
      n_blocks: N, room for so many blocks; None for all that there could be.

    Returns:
      (Blocks, [] int32 how many are needed: where it is above N, some are missing).
    """
    rows, width = indices.shape
    size = min(BLOCK, width)
    per_row = -(-width // size)
    used = jnp.minimum(-(-count // size), per_row).astype(jnp.int32)
    ends = jnp.cumsum(used, dtype=jnp.int32)
    number = jnp.arange(rows * per_row if n_blocks is None else n_blocks, dtype=jnp.int32)
    owner = jnp.searchsorted(ends, number, side="right").astype(jnp.int32)
    slot = number - jnp.take(ends - used, owner, mode="clip")
    slot = jnp.where(owner < rows, slot, 0)
    padded = jnp.pad(indices, ((0, 0), (0, per_row * size - width)), constant_values=jnp.iinfo(jnp.int32).max)
    blocks = padded.reshape(rows, per_row, size).at[owner, slot].get(mode="fill", fill_value=jnp.iinfo(jnp.int32).max)
    total = ends[-1] if rows else jnp.int32(0)
    return Blocks(blocks, owner, slot, ends - used, used), total


def combine_rows(weights: jax.Array, blocks: Blocks, table: jax.Array) -> jax.Array:
    """Weighted sums of rows of a table.

    Args:
      weights: [B, T, K], T sums over the same rows; 0 where there is no row.
      blocks: of the B inputs.
      table: [n, d].

    Returns:
      [B, T, d].
    """

    def one_by_one(weights: jax.Array, indices: jax.Array, table: jax.Array) -> jax.Array:
        return lax.map(lambda block: block[0] @ _take(table, block[1]), (weights, indices))

    def together(weights: jax.Array, indices: jax.Array, table: jax.Array) -> jax.Array:
        return jnp.einsum("nts,nsd->ntd", weights, _take(table, indices))

    parts = lax.platform_dependent(_to_blocks(weights, blocks), blocks.indices, table, cpu=one_by_one, default=together)
    sums = jnp.zeros((*weights.shape[:2], table.shape[-1]), parts.dtype)
    return sums.at[blocks.owner].add(parts, mode="drop", indices_are_sorted=True)


def dot_rows(rows: jax.Array, blocks: Blocks, table: jax.Array, k: int) -> jax.Array:
    """Scalar products of every input with its rows of a table.

    Args:
      rows: [B, T, d].
      blocks: of the B inputs.
      table: [n, d].
      k: places of an input.

    Returns:
      [B, T, k]; of no use where there is no row.
    """

    def one_by_one(rows: jax.Array, indices: jax.Array, owner: jax.Array, table: jax.Array) -> jax.Array:
        return lax.map(lambda block: _take(rows, block[1]) @ _take(table, block[0]).T, (indices, owner))

    def together(rows: jax.Array, indices: jax.Array, owner: jax.Array, table: jax.Array) -> jax.Array:
        return jnp.einsum("ntd,nsd->nts", _take(rows, owner), _take(table, indices))

    products = lax.platform_dependent(rows, blocks.indices, blocks.owner, table, cpu=one_by_one, default=together)
    return _from_blocks(products, blocks, k)


def accumulate_rows(weights: jax.Array, blocks: Blocks, rows: jax.Array, n: int) -> jax.Array:
    """Adds weighted rows up in a table: the derivative of :func:`combine_rows` with respect to its table.

    Args:
      weights: [B, T, K].
      blocks: of the B inputs.
      rows: [B, T, d].
      n: rows of the table.

    Returns:
      [n, d], row i the sum over all places with index i of the T rows times their weights.
    """

    def one_by_one(weights: jax.Array, indices: jax.Array, owner: jax.Array, rows: jax.Array) -> jax.Array:
        def add(table: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            weights, indices, owner = block
            return table.at[indices].add(weights.T @ _take(rows, owner), mode="drop"), None

        return lax.scan(add, jnp.zeros((n, rows.shape[-1]), rows.dtype), (weights, indices, owner))[0]

    def together(weights: jax.Array, indices: jax.Array, owner: jax.Array, rows: jax.Array) -> jax.Array:
        taken = _take(rows, owner)
        # Not a product of matrices: its result, [N, S, d], would go through memory on a GPU.
        terms = sum(weights[:, t, :, None] * taken[:, t, None] for t in range(taken.shape[1]))
        return jnp.zeros((n, rows.shape[-1]), rows.dtype).at[indices].add(terms, mode="drop")

    weights = _to_blocks(weights, blocks)
    return lax.platform_dependent(weights, blocks.indices, blocks.owner, rows, cpu=one_by_one, default=together)


def _to_blocks(values: jax.Array, blocks: Blocks) -> jax.Array:
    """[B, T, K] values of places to [N, T, S]; 0 in blocks that are left over."""
    rows, terms, width = values.shape
    size = blocks.indices.shape[-1]
    padded = jnp.pad(values, ((0, 0), (0, 0), (0, -width % size))).reshape(rows, terms, -1, size)
    return padded.at[blocks.owner, :, blocks.slot].get(mode="fill", fill_value=0)


def _from_blocks(values: jax.Array, blocks: Blocks, k: int) -> jax.Array:
    """[N, T, S] values of blocks to [B, T, k]; 0 in blocks that are not in use."""
    _, terms, size = values.shape
    slots = jnp.arange(-(-k // size), dtype=jnp.int32)[None, :]
    number = jnp.where(slots < blocks.used[:, None], blocks.first[:, None] + slots, len(values))
    found = jnp.take(values, number, axis=0, mode="fill", fill_value=0)  # [B, slots, T, S]
    return jnp.swapaxes(found, 1, 2).reshape(len(number), terms, -1)[..., :k]


def _take(table: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.take(table, indices, axis=0, mode="clip")
