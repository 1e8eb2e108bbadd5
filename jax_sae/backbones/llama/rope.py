"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and the rescalings of it that Llamas use."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_sae.errors import InputError


def rope_tables(
    length: int, head_dim: int, theta: float, factors: tuple[float, ...] | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles ``position * theta^(-2 i / head_dim) / factors[i]``.

    Args:
      length: positions 0 to length - 1.
      head_dim: width of a head; angle i turns the pair of features (i, i + head_dim / 2).
      theta: base of the wavelengths.
      factors: [head_dim / 2] what the frequencies are divided by; None is all ones.

    Returns:
      (cos, sin), float32 [length, head_dim / 2]; the angles are computed in float64.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if factors is not None:
        frequencies = frequencies / np.asarray(factors, np.float64)
    angles = np.outer(np.arange(length), frequencies)
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + head_dim / 2) of every head: Hugging Face's half-split convention.

    GGUF files store the rows of W_Q and W_K for adjacent pairs (2 i, 2 i + 1); they are put back when read.

    Args:
      x: [batch, length, heads, head_dim].
      cos: [length, head_dim / 2], from :func:`rope_tables`.
      sin: the same.

    Returns:
      The shape and dtype of ``x``.
    """
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rope_factors(scaling: Mapping[str, Any] | None, theta: float, head_dim: int) -> tuple[float, ...] | None:
    """What each frequency is divided by, from the ``rope_scaling`` of a Hugging Face ``config.json``.

    ``linear`` divides all by its factor; ``llama3`` divides long wavelengths by its factor, keeps short
    ones and interpolates between (Llama 3.1).

    Raises:
      InputError: another type of scaling.
    """
    kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"
    if scaling is None or kind == "default":
        return None
    if kind == "linear":
        return (float(scaling["factor"]),) * (head_dim // 2)
    if kind != "llama3":
        raise InputError(f"rope scaling {kind!r} is not supported; expected default, linear or llama3")
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    factors = []
    for i in range(0, head_dim, 2):
        turns = original / (2 * math.pi * theta ** (i / head_dim))
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - kept) / factor + kept))
    return tuple(factors)
