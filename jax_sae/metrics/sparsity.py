"""How sparse activations are: zeros, active concepts, firing counts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparsitySums:
    """Mergeable counts over rows.

    Attributes:
      rows: [] number of rows.
      firing: [M] rows on which each concept is not exactly zero.
    """

    rows: Any
    firing: Any

    @classmethod
    def of_batch(cls, activations: jax.Array) -> "SparsitySums":
        """Counts of ``activations [B, M]``, at most B each, in int32; pure, to be jitted."""
        return cls(jnp.int32(len(activations)), jnp.sum(activations != 0, axis=0, dtype=jnp.int32))

    def merge(self, other: "SparsitySums") -> "SparsitySums":
        """Counts over the rows of both."""
        return SparsitySums(self.rows + other.rows, self.firing + other.firing)

    def compute(self) -> dict[str, float]:
        """``l0`` (fraction of exact zeros), ``active`` (mean count per row), ``dead_fraction`` (never fire)."""
        firing = np.asarray(self.firing)
        active = firing.sum(dtype=np.int64) / int(self.rows)  # the sum over concepts may pass what int32 holds
        return {
            "l0": float(1 - active / len(firing)),
            "active": float(active),
            "dead_fraction": float((firing == 0).mean()),
        }
