"""Sparse codes: the active concepts of an input as values and indices, and what is computed from them."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseCodes:
    """The nonzero entries of rows of activations, up to K of them.

    Attributes:
      values: [..., K] activations, 0 in unused places.
      indices: [..., K] int32 concepts in ascending order, M in unused places.
      count: [...] int32 number of nonzero entries of the row; above K the row overflowed and holds its first K.
    """

    values: jax.Array
    indices: jax.Array
    count: jax.Array

    def to_dense(self, n_concepts: int) -> jax.Array:
        """[..., n_concepts] activations."""
        lead, width = self.values.shape[:-1], self.values.shape[-1]
        values, indices = self.values.reshape(-1, width), self.indices.reshape(-1, width)
        dense = jnp.zeros((values.shape[0], n_concepts), values.dtype)
        dense = dense.at[jnp.arange(values.shape[0])[:, None], indices].set(values, mode="drop")
        return dense.reshape(*lead, n_concepts)


def to_codes(activations: jax.Array, k: int) -> SparseCodes:
    """The first ``k`` nonzero entries of every row.

    The place of the j-th nonzero entry is found by binary search in the running count of nonzeros: no sort and no
    scatter.

    Args:
      activations: [..., M].
      k: places per row, at least 1.

    Returns:
      SparseCodes with K = k. Rows with more than k nonzero entries say so in ``count``.

    Raises:
      ValueError: k is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> codes = to_codes(jnp.array([0.0, 2.0, 0.0, -1.0]), k=3)
      >>> codes.indices.tolist(), codes.values.tolist(), int(codes.count)
      ([1, 3, 4], [2.0, -1.0, 0.0], 2)
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1 place per row")
    width = activations.shape[-1]
    running = jnp.cumsum(activations != 0, axis=-1, dtype=jnp.int32)
    rows = running.reshape(-1, width)
    find = jax.vmap(lambda row: jnp.searchsorted(row, jnp.arange(1, k + 1, dtype=jnp.int32)))
    indices = find(rows).astype(jnp.int32).reshape(*activations.shape[:-1], k)
    values = jnp.take_along_axis(activations, indices, axis=-1, mode="fill", fill_value=0)
    return SparseCodes(values, indices, running[..., -1])


def sparse_decode(codes: SparseCodes, dictionary: jax.Array) -> jax.Array:
    """Sum over the active concepts of value times dictionary row.

    Args:
      codes: of rows [..., K].
      dictionary: [M, d].

    Returns:
      [..., d]; of an overflowed row, the sum over the K concepts it holds.
    """
    rows = jnp.take(dictionary, codes.indices, axis=0, mode="fill", fill_value=0)  # [..., K, d]
    return jnp.einsum("...k,...kd->...d", codes.values, rows)
