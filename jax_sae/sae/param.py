"""Parameters that are stored otherwise than they are read."""

from typing import Any

import jax
from flax import nnx


class StoredTransposed(nnx.Param):
    """A matrix that is stored as its transpose: ``W_enc [d, M]`` as M rows of length d, one for each concept.

    A training step takes the rows of a few active concepts out of it and adds to them; in [d, M] each would be spread
    over the whole array. Indexing, ``shape`` and assignment are those of the matrix; as a leaf of a pytree (under
    ``jax.tree.map``, optax or a checkpoint) it is the stored [M, d] array.
    """

    @classmethod
    def of_rows(cls, rows: jax.Array) -> "StoredTransposed":
        """The parameter whose stored rows are ``rows [M, d]``."""
        return cls(rows)

    def get_value(self, *, index: Any = ...) -> jax.Array:
        """The matrix, or a part of it."""
        value = self.get_raw_value().T
        return value if index is ... else value[index]

    def set_value(self, value: jax.Array, *, index: Any = ...) -> None:
        """Replaces the matrix, or a part of it."""
        whole = value if index is ... else self.get_value().at[index].set(value)
        super().set_value(whole.T)
