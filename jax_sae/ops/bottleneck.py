"""The hot path of a training step: scores, selection and decoding, with one dense matrix product.

Of B x M scores some tens per row are active. :func:`find_places` computes all scores, once and without a derivative,
and keeps those that may be active; :func:`bottleneck` goes on from there, forward and backward, over these alone.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_sae.ops.compaction import compact
from jax_sae.ops.products import ScoreDtype, score_products
from jax_sae.ops.rows import Blocks, accumulate_rows, combine_rows, dot_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """The concepts of every row that may be active. Nothing in it has a derivative.

    Attributes:
      indices: [B, K] int32, the used places first; M or above in the others.
      products: [B, K] ``query . key``; of no use in unused places.
      used: [B] int32, places of the row that are in use.
      count: [B] int32, concepts of the row that may be active. Where it is above K, some have no place.
    """

    indices: jax.Array
    products: jax.Array
    used: jax.Array
    count: jax.Array

    def narrow(self, kept: jax.Array) -> "Places":
        """Only the used places where ``kept [B, K]``, in no particular order."""
        positions, used = compact(kept & (jnp.arange(kept.shape[-1])[None, :] < self.used[:, None]), kept.shape[-1])
        none = jnp.iinfo(jnp.int32).max
        indices = jnp.take_along_axis(self.indices, positions, axis=-1, mode="fill", fill_value=none)
        products = jnp.take_along_axis(self.products, positions, axis=-1, mode="fill", fill_value=0)
        return Places(indices, products, used, self.count)


Activate = Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]


def find_places(
    query: jax.Array,
    keys: jax.Array,
    candidates: Callable[[jax.Array], jax.Array],
    capacity: int,
    *,
    ascending: bool = False,
    dtype: ScoreDtype = "auto",
) -> Places:
    """The concepts of every row that may be active, and their products with its query: the dense matrix product.

    Args:
      query: [B, d].
      keys: [M, d].
      candidates: from products [B, M] to bool [B, M], True for every concept that may be active.
      capacity: K, places per row.
      ascending: whether the places of a row have to be in the order of the concepts.
      dtype: of :func:`jax_sae.ops.score_products`.
    """
    products = score_products(jax.lax.stop_gradient(query), jax.lax.stop_gradient(keys), dtype)
    indices, count = compact(candidates(products), capacity)
    if ascending:
        indices = jnp.sort(indices, axis=-1)
    found = jnp.take_along_axis(products, jnp.minimum(indices, keys.shape[0] - 1), axis=-1)
    return Places(indices, found, jnp.minimum(count, capacity), count)


def bottleneck(
    activate: Activate,
    group_sizes: tuple[int, ...],
    extras: Any,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array | None,
    places: Places,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Activations and their decoding, over given places.

    Args:
      activate: from ``(extras, products [B, K])`` to (scores [B, K], activations [B, K]); activations are 0 in unused
        places.
      group_sizes: consecutive parts of the dictionary that are decoded apart; they add up to M.
      extras: what else ``activate`` needs: a pytree of arrays, differentiated.
      query: [B, d].
      keys: [M, d].
      values: [M, d] rows that activations are multiplied by; None where they are the keys, whose two gradients are
        then added up in one array.
      places: from :func:`find_places`. Their products are taken as the function of ``query`` and ``keys`` that they
        are.
      blocks: of these places, all that are in use.

    Returns:
      y: [B, G, d], for every group the sum over its concepts of activation times value.
      scores: [B, K].
      activations: [B, K].

    Derivatives: reverse mode, exact over the places; nothing of size [B, M] or [B, K, d] is formed.
    """
    return _bottleneck(activate, group_sizes, extras, (query, keys, values), (places, blocks))


Outputs = tuple[jax.Array, jax.Array, jax.Array]
Factors = tuple[jax.Array, jax.Array, jax.Array | None]
Where = tuple[Places, Blocks]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _bottleneck(activate: Activate, sizes: tuple[int, ...], extras: Any, factors: Factors, where: Where) -> Outputs:
    return _forward(activate, sizes, extras, factors, where)[0]


def _forward(
    activate: Activate, sizes: tuple[int, ...], extras: Any, factors: Factors, where: Where
) -> tuple[Outputs, tuple]:
    (_, keys, values), (places, blocks) = factors, where
    (scores, activations), pull_back = jax.vjp(activate, extras, places.products)
    y = combine_rows(_by_group(activations, places.indices, sizes), blocks, keys if values is None else values)
    return (y, scores, activations), (pull_back, factors, places.indices, blocks, activations)


def _backward(activate: Activate, sizes: tuple[int, ...], residuals: tuple, cotangents: Outputs) -> tuple:
    pull_back, (query, keys, values), indices, blocks, activations = residuals
    dy, dscores, dactivations = cotangents
    products = dot_rows(dy, blocks, keys if values is None else values, indices.shape[-1])
    in_group = _by_group(jnp.ones_like(activations), indices, sizes)
    dextras, dproducts = pull_back((dscores, dactivations + jnp.sum(products * in_group, axis=1)))
    dquery = combine_rows(dproducts[:, None], blocks, keys)[:, 0]
    of_keys, of_values = (dproducts[:, None], query[:, None]), (_by_group(activations, indices, sizes), dy)
    if values is None:
        weights, rows = (jnp.concatenate(both, axis=1) for both in zip(of_keys, of_values, strict=True))
        return dextras, (dquery, accumulate_rows(weights, blocks, rows, len(keys)), None), None
    dkeys, dvalues = (accumulate_rows(weights, blocks, rows, len(keys)) for weights, rows in (of_keys, of_values))
    return dextras, (dquery, dkeys, dvalues), None


_bottleneck.defvjp(_forward, _backward)


def _by_group(weights: jax.Array, indices: jax.Array, group_sizes: tuple[int, ...]) -> jax.Array:
    """[B, K] weights to [B, G, K]: each in the row of the group that its index is in; 0 in unused places."""
    if len(group_sizes) == 1:
        return weights[:, None]
    ends = jnp.cumsum(jnp.array(group_sizes, jnp.int32))
    group = jnp.searchsorted(ends, indices, side="right")  # G for unused places
    return jnp.where(group[:, None] == jnp.arange(len(group_sizes))[None, :, None], weights[:, None], 0)
