"""Sparse codes: the active concepts of an input as values and indices, and what is computed from them."""

import dataclasses

import jax
import jax.numpy as jnp

from jax_sae.ops.compaction import compact
from jax_sae.ops.rows import Blocks, accumulate_rows, combine_rows, dot_rows, plan_blocks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseCodes:
    """The nonzero entries of rows of activations, up to K of them.

    Attributes:
      values: [..., K] activations, 0 in unused places.
      indices: [..., K] int32 concepts in ascending order, M in unused places.
      count: [...] int32 number of nonzero entries of the row; above K the row overflowed and holds K of them.
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
    """The nonzero entries of every row, up to ``k`` of them.

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
    lead, width = activations.shape[:-1], activations.shape[-1]
    indices, count = compact((activations != 0).reshape(-1, width), k)
    indices = jnp.sort(indices, axis=-1).reshape(*lead, k)
    values = jnp.take_along_axis(activations, indices, axis=-1, mode="fill", fill_value=0)
    return SparseCodes(values, indices, count.reshape(lead))


def sparse_decode(codes: SparseCodes, dictionary: jax.Array) -> jax.Array:
    """Sum over the active concepts of value times dictionary row.

    Args:
      codes: of rows [..., K].
      dictionary: [M, d].

    Returns:
      [..., d]; of an overflowed row, the sum over the K concepts it holds.

    Derivatives: reverse mode, with respect to the values and the dictionary, over the active concepts alone.
    """
    lead, width = codes.values.shape[:-1], codes.values.shape[-1]
    values, indices = codes.values.reshape(-1, width), codes.indices.reshape(-1, width)
    # Every place, wherever in the row the used ones are.
    blocks, _ = plan_blocks(indices, jnp.full(len(indices), width, jnp.int32))
    return decode_places(values, indices, blocks, dictionary).reshape(*lead, dictionary.shape[-1])


@jax.custom_vjp
def decode_places(values: jax.Array, indices: jax.Array, blocks: Blocks, dictionary: jax.Array) -> jax.Array:
    """:func:`sparse_decode` of ``values`` and ``indices`` [B, K], of which ``blocks`` hold all that are used."""
    return combine_rows(values[:, None], blocks, dictionary)[:, 0]


def _decode_forward(
    values: jax.Array, indices: jax.Array, blocks: Blocks, dictionary: jax.Array
) -> tuple[jax.Array, tuple]:
    return decode_places(values, indices, blocks, dictionary), (values, indices, blocks, dictionary)


def _decode_backward(residuals: tuple, dy: jax.Array) -> tuple[jax.Array, None, None, jax.Array]:
    values, indices, blocks, dictionary = residuals
    products = dot_rows(dy[:, None], blocks, dictionary, indices.shape[-1])[:, 0]
    by_values = jnp.where(indices < dictionary.shape[0], products, 0)
    return by_values, None, None, accumulate_rows(values[:, None], blocks, dy[:, None], dictionary.shape[0])


decode_places.defvjp(_decode_forward, _decode_backward)
