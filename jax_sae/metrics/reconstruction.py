"""How well rows are reconstructed: FVU per sample and pooled, NMSE, cosine similarity."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

_TINY_NORM = 1e-8
_STANDARD_DEVIATION_EPS = 1e-5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReconstructionSums:
    """Mergeable sums over rows; the value does not depend on how rows were batched.

    Attributes:
      rows: [] number of rows.
      varied_rows: [] rows whose features are not all equal: those that have an FVU.
      fvu: [] sum over them of var(x - x_hat) / var(x), ddof 1.
      nmse: [] sum over them of the mean squared error in units of ``std(x) + 1e-5``, ddof 1.
      cosine: [] sum of cosine similarities.
      squared_error: [] sum of squared errors over rows and features.
      origin: [d] one of the rows.
      offset: [d] mean of the rows relative to ``origin``, so that it is exact for rows that are far from zero.
      squares: [] sum of squared distances of the rows from their mean.
    """

    rows: Any
    varied_rows: Any
    fvu: Any
    nmse: Any
    cosine: Any
    squared_error: Any
    origin: Any
    offset: Any
    squares: Any

    @classmethod
    def of_batch(cls, x: jax.Array, x_hat: jax.Array) -> "ReconstructionSums":
        """Sums of ``x [B, d]`` and its reconstruction, in float32; pure, to be jitted."""
        x, x_hat = x.astype(jnp.float32), x_hat.astype(jnp.float32)
        error = x - x_hat
        variance = jnp.var(x - x[:, :1], axis=-1, ddof=1)  # exactly 0 for a constant row, whatever its value
        varies = variance > 0
        fvu = jnp.var(error, axis=-1, ddof=1) / jnp.where(varies, variance, 1.0)
        nmse = jnp.mean(error**2, axis=-1) / (jnp.sqrt(variance) + _STANDARD_DEVIATION_EPS) ** 2
        norms = [jnp.maximum(jnp.linalg.norm(rows, axis=-1), _TINY_NORM) for rows in (x, x_hat)]
        relative = x - x[:1]
        offset = jnp.mean(relative, axis=0)
        return cls(
            rows=jnp.int32(len(x)),
            varied_rows=jnp.sum(varies, dtype=jnp.int32),
            fvu=jnp.sum(jnp.where(varies, fvu, 0.0)),
            nmse=jnp.sum(jnp.where(varies, nmse, 0.0)),
            cosine=jnp.sum(jnp.sum(x * x_hat, axis=-1) / (norms[0] * norms[1])),
            squared_error=jnp.sum(error**2),
            origin=x[0],
            offset=offset,
            squares=jnp.sum((relative - offset[None, :]) ** 2),
        )

    def merge(self, other: "ReconstructionSums") -> "ReconstructionSums":
        """Sums over the rows of both (Chan, Golub and LeVeque 1979 for the mean and the squares)."""
        rows = self.rows + other.rows
        shift = (other.origin - self.origin) + (other.offset - self.offset)
        return ReconstructionSums(
            rows=rows,
            varied_rows=self.varied_rows + other.varied_rows,
            fvu=self.fvu + other.fvu,
            nmse=self.nmse + other.nmse,
            cosine=self.cosine + other.cosine,
            squared_error=self.squared_error + other.squared_error,
            origin=self.origin,
            offset=self.offset + shift * (other.rows / rows),
            squares=self.squares + other.squares + (shift @ shift) * (self.rows * other.rows / rows),
        )

    def compute(self) -> dict[str, float]:
        """``fvu`` and ``nmse`` (means over rows that vary), ``fvu_pooled``, ``cs``, ``undefined_rows`` (constant rows).

        ``nmse`` is the mean squared error of rows that were standardised one by one, the text metric of the
        Sparsemax SAE. A set of constant rows has no ``fvu`` and no ``nmse``, a set of equal rows no ``fvu_pooled``:
        they are NaN. In ``cs`` a norm below 1e-8 counts as 1e-8, so that a zero row has similarity 0.
        """
        nan = float("nan")
        return {
            "fvu": float(self.fvu / self.varied_rows) if self.varied_rows else nan,
            "nmse": float(self.nmse / self.varied_rows) if self.varied_rows else nan,
            "fvu_pooled": float(self.squared_error / self.squares) if self.squares else nan,
            "cs": float(self.cosine / self.rows),
            "undefined_rows": int(self.rows - self.varied_rows),
        }
