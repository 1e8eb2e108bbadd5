"""What an implementation of sparsemax has to compute."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

Threshold = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Solver:
    """One implementation of sparsemax over rows ``z [B, M]`` of any float dtype, M >= 1; neither has a derivative here.

    Each takes ``(z, axis_name)``. With ``axis_name`` the columns are sharded over that mapped axis, and the results are
    the same on all of it; None for whole rows. Entries of -inf have p = 0. A row with NaN, with +inf or with nothing
    but -inf is undefined.

    Attributes:
      threshold: ``(top [B, 1], tau [B, 1], count [B, 1])``, the row maximum, the threshold relative to it, and the size
        of the support (int32), so that ``p = max((z - top) - tau, 0)``: differences are formed after the maximum is
        subtracted, which keeps rows with a large offset exact. ``top`` and ``tau`` are of :func:`compute_dtype`. Of an
        undefined row, tau is NaN and count 0.
      project: p [B, M] in the dtype of z. NaN for an undefined row.
    """

    threshold: Callable[[jax.Array, str | None], Threshold]
    project: Callable[[jax.Array, str | None], jax.Array]


def compute_dtype(z: jax.Array) -> jnp.dtype:
    """float64 for float64 scores, float32 for all others."""
    return jnp.dtype(jnp.float64 if z.dtype == jnp.float64 else jnp.float32)
