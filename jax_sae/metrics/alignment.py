"""How far two representations agree on which rows are neighbours: CKNNA."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_sae.metrics.precision import at_least_float32, full_precision

_BLOCK = 1024  # rows of a kernel that exist at one time


@functools.partial(jax.jit, static_argnames="neighbors")
@full_precision
def cknna(a: jax.Array, b: jax.Array, *, neighbors: int = 10) -> jax.Array:
    r"""Centred kernel nearest-neighbour alignment of two representations of the same rows.

    The linear kernels ``K = a a^T`` and ``L = b b^T`` are masked to the entries (i, j) where j is among the nearest
    rows of i by both, and compared by the unbiased HSIC:

    .. math:: \frac{H(mK, mL)}{\sqrt{H(m_K K, m_K K)\, H(m_L L, m_L L)} + 10^{-6}}

    Args:
      a: [n, p] rows; float64 is computed in float64, everything else in float32.
      b: [n, q] other representations of them.
      neighbors: nearest rows of each row, by the largest kernel value and not itself; of equal values the lower
        index is nearer.

    Returns:
      [] 1 for a representation and itself, about 0 for unrelated ones.

    Raises:
      ValueError: the numbers of rows differ, or there are too few: 4 are needed, and more than ``neighbors``.

    Cost: ``2 n^2 (p + q)`` operations for the kernels, which exist in blocks of rows; what is kept is
    ``O(n neighbors)``. At n = 10,000 with 49,152 concepts that is 10^13.

    References:
      Huh et al. 2024, "The Platonic Representation Hypothesis" (arXiv 2405.07987), appendix A; Song et al. 2012 for
      the unbiased HSIC.
    """
    if len(a) != len(b):
        raise ValueError(f"cknna got {len(a)} rows and {len(b)} rows; expected two representations of the same rows")
    if len(a) < max(4, neighbors + 1):
        raise ValueError(
            f"cknna got {len(a)} rows; expected at least {max(4, neighbors + 1)} for {neighbors} neighbors"
        )
    of_a, of_b = (_nearest(at_least_float32(rows), neighbors) for rows in (a, b))
    shared = of_a[1][:, :, None] == of_b[1][:, None, :]  # [n, neighbors, neighbors]
    in_both = jnp.any(shared, axis=-1)
    indices = of_a[1]
    mutual_a = jnp.where(in_both, of_a[0], 0.0)
    mutual_b = jnp.sum(jnp.where(shared, of_b[0][:, None, :], 0.0), axis=-1)
    between = _unbiased_hsic(mutual_a, mutual_b, indices, indices)
    own = [_unbiased_hsic(values, values, at, at) for values, at in (of_a, of_b)]
    scale = jnp.sqrt(jnp.abs(own[0])) * jnp.sqrt(jnp.abs(own[1]))  # their product may pass what float32 holds
    scale = jnp.where(jnp.sign(own[0]) * jnp.sign(own[1]) < 0, jnp.nan, scale)
    return between / (scale + 1e-6)


def _nearest(rows: jax.Array, neighbors: int) -> tuple[jax.Array, jax.Array]:
    """Kernel values and indices [n, neighbors] of the nearest other rows of ``rows [n, p]``."""
    n = len(rows)
    size = min(n, _BLOCK)

    def block(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = jnp.minimum(i * size, n - size)  # the last block reaches back over rows that are done
        kernel = lax.dynamic_slice_in_dim(rows, start, size) @ rows.T
        itself = jnp.arange(n)[None, :] == start + jnp.arange(size)[:, None]
        best = lax.top_k(jnp.where(itself, -jnp.inf, kernel), neighbors)
        return tuple(lax.dynamic_update_slice_in_dim(w, p, start, 0) for w, p in zip(found, best, strict=True))  # type: ignore[return-value]

    empty = jnp.zeros((n, neighbors), rows.dtype), jnp.zeros((n, neighbors), jnp.int32)
    return lax.fori_loop(0, -(-n // size), block, empty)


def _unbiased_hsic(k: jax.Array, other: jax.Array, at_k: jax.Array, at_other: jax.Array) -> jax.Array:
    """Unbiased HSIC of two sparse [n, n] matrices: row i of the first has ``k[i]`` at the columns ``at_k[i]``."""
    n = len(k)
    columns_k = jnp.zeros(n, k.dtype).at[at_k].add(k)
    rows_other = jnp.sum(other, axis=-1)
    # The sum of K * L^T: entry (i, j) of the one meets entry (j, i) of the other.
    back = at_other[at_k] == jnp.arange(n)[:, None, None]  # [n, neighbors, neighbors]
    traces = jnp.sum(k * jnp.sum(jnp.where(back, other[at_k], 0.0), axis=-1))
    product = jnp.sum(columns_k * rows_other)
    sums = jnp.sum(k) * jnp.sum(other) / ((n - 1) * (n - 2))
    return (traces + sums - 2 * product / (n - 2)) / (n * (n - 3))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AlignmentSums:
    """Mergeable mean of :func:`cknna` over batches of rows.

    The value depends on the size of the batches, since neighbours are looked for inside of one: use one size, full
    batches only.

    Attributes:
      batches: [] number of batches.
      total: [] sum of their values.
    """

    batches: Any
    total: Any

    @classmethod
    def of_batch(cls, a: jax.Array, b: jax.Array, *, neighbors: int = 10) -> "AlignmentSums":
        """One batch of rows ``a [n, p]`` and ``b [n, q]``."""
        return cls(jnp.int32(1), cknna(a, b, neighbors=neighbors))

    def merge(self, other: "AlignmentSums") -> "AlignmentSums":
        """The batches of both."""
        return AlignmentSums(self.batches + other.batches, self.total + other.total)

    def compute(self) -> dict[str, float]:
        """``cknna``, the mean over batches."""
        return {"cknna": float(self.total / self.batches)}
