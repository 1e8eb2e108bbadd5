"""The dense matrix product of every autoencoder: rows with keys, at a precision of its own."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

ScoreDtype = Literal["auto", "float32", "bfloat16"]


def score_products(query: jax.Array, keys: jax.Array, dtype: ScoreDtype = "auto") -> jax.Array:
    """Scalar products of rows with keys, summed up in float32.

    Args:
      query: [..., d] float32.
      keys: [M, d] float32.
      dtype: what both are rounded to first. ``"float32"`` keeps all bits, also where the platform's own matrix product
        would not; ``"auto"`` is bfloat16 where that is what matrix units are made for, on TPUs and GPUs, and float32
        elsewhere.

    Returns:
      [..., M] float32.

    Derivatives: those of the exact product; rounding passes gradients through.
    """
    return _products(query, keys, dtype)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _products(query: jax.Array, keys: jax.Array, dtype: ScoreDtype) -> jax.Array:
    exact = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    match dtype:
        case "auto":
            return lax.platform_dependent(query, keys.T, cpu=exact, default=_rounded)
        case "bfloat16":
            return _rounded(query, keys.T)
        case _:
            return exact(query, keys.T)


def _rounded(query: jax.Array, keys: jax.Array) -> jax.Array:
    return jnp.matmul(query.astype(jnp.bfloat16), keys.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


@_products.defjvp
def _products_jvp(dtype: ScoreDtype, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (query, keys), (dquery, dkeys) = primals, tangents
    return _products(query, keys, dtype), dquery @ keys.T + query @ dkeys.T
