"""What the concepts are like: overlap of the decoder rows (DO), monosemanticity over images (MS)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_sae.metrics.precision import at_least_float32, full_precision

_TINY_NORM = 1e-8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OrthogonalitySums:
    """Mergeable sums over decoder rows, for the overlap of every pair without a matrix of pairs.

    Attributes:
      rows: [] number of rows M.
      gram: [d, d] sum of the outer products of the rows with themselves.
      fourth: [] sum of ``||row||^4``.
      unit_gram: [d, d] ``gram`` of the rows at norm 1; a zero row stays zero.
      unit_fourth: [] ``fourth`` of them: the number of rows that are not zero.
    """

    rows: Any
    gram: Any
    fourth: Any
    unit_gram: Any
    unit_fourth: Any

    @classmethod
    @full_precision
    def of_batch(cls, decoder: jax.Array) -> "OrthogonalitySums":
        """Sums of some rows ``decoder [B, d]``, in float32 (float64 for float64); pure, to be jitted."""
        decoder = at_least_float32(decoder)
        norm = jnp.linalg.norm(decoder, axis=-1, keepdims=True)
        unit = decoder / jnp.where(norm > 0, norm, 1.0)
        return cls(
            rows=jnp.int32(len(decoder)),
            gram=decoder.T @ decoder,
            fourth=jnp.sum(norm**4),
            unit_gram=unit.T @ unit,
            unit_fourth=jnp.sum(jnp.sum(unit**2, axis=-1) ** 2),
        )

    def merge(self, other: "OrthogonalitySums") -> "OrthogonalitySums":
        """Sums over the rows of both."""
        return jax.tree.map(lambda a, b: a + b, self, other)

    def compute(self) -> dict[str, float]:
        """``do`` of the rows at norm 1 and ``do_raw`` of the rows as they are.

        The mean over all M^2 ordered pairs of the squared scalar product, the diagonal counted as 0. Random
        directions give about 1/d.
        """
        pairs = float(self.rows) ** 2
        overlap = lambda gram, fourth: max(0.0, float(np.sum(gram * gram) - fourth) / pairs)  # noqa: E731
        return {"do": overlap(self.unit_gram, self.unit_fourth), "do_raw": overlap(self.gram, self.fourth)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MonosemanticitySums:
    """Mergeable sums over images: how alike the images are that a concept fires on.

    Activations are taken relative to each concept's smallest one, and the image of the largest stands apart from the
    sums, so that nothing cancels when one activation dwarfs the others.

    Attributes:
      images: [] number of images.
      embedding: [e] sum of the unit embeddings.
      smallest: [M] smallest activation.
      at_smallest: [M] images with exactly that activation.
      peak: [M] largest ``a - smallest``, on one image.
      peak_embedding: [M, e] unit embedding of that image.
      total: [M] sum of ``a - smallest`` over the other images.
      squares: [M] sum of its squares over them.
      weighted: [M, e] sum of ``(a - smallest)`` times the unit embedding over them.
    """

    images: Any
    embedding: Any
    smallest: Any
    at_smallest: Any
    peak: Any
    peak_embedding: Any
    total: Any
    squares: Any
    weighted: Any

    @classmethod
    @full_precision
    def of_batch(cls, activations: jax.Array, embeddings: jax.Array) -> "MonosemanticitySums":
        """Sums in float32; pure, to be jitted.

        Args:
          activations: [B, M] one number for an image and a concept.
          embeddings: [B, e] of the images, of any norm but 0.
        """
        activations, embeddings = activations.astype(jnp.float32), embeddings.astype(jnp.float32)
        unit = embeddings / jnp.maximum(jnp.linalg.norm(embeddings, axis=-1, keepdims=True), _TINY_NORM)
        smallest = jnp.min(activations, axis=0)
        above = activations - smallest[None, :]
        highest = jnp.argmax(above, axis=0)
        others = jnp.where(jnp.arange(len(above))[:, None] == highest[None, :], 0.0, above)
        return cls(
            images=jnp.int32(len(activations)),
            embedding=jnp.sum(unit, axis=0),
            smallest=smallest,
            at_smallest=jnp.sum(above == 0, axis=0, dtype=jnp.int32),
            peak=jnp.max(above, axis=0),
            peak_embedding=unit[highest],
            total=jnp.sum(others, axis=0),
            squares=jnp.sum(others**2, axis=0),
            weighted=others.T @ unit,
        )

    def merge(self, other: "MonosemanticitySums") -> "MonosemanticitySums":
        """Sums over the images of both."""
        smallest = np.minimum(self.smallest, other.smallest)
        a, b = self._relative_to(smallest), other._relative_to(smallest)
        ahead = a.peak >= b.peak
        lower = np.minimum(a.peak, b.peak)
        lower_embedding = np.where(ahead[:, None], b.peak_embedding, a.peak_embedding)
        return MonosemanticitySums(
            images=a.images + b.images,
            embedding=a.embedding + b.embedding,
            smallest=smallest,
            at_smallest=a.at_smallest + b.at_smallest,
            peak=np.maximum(a.peak, b.peak),
            peak_embedding=np.where(ahead[:, None], a.peak_embedding, b.peak_embedding),
            total=a.total + b.total + lower,
            squares=a.squares + b.squares + lower**2,
            weighted=a.weighted + b.weighted + lower[:, None] * lower_embedding,
        )

    def _relative_to(self, smallest: np.ndarray) -> "MonosemanticitySums":
        """The same sums with ``a - smallest`` for a smaller ``smallest``."""
        rise, others = self.smallest - smallest, self.images - 1
        rest = self.embedding[None, :] - self.peak_embedding
        return dataclasses.replace(
            self,
            at_smallest=np.where(rise == 0, self.at_smallest, 0),
            peak=self.peak + rise,
            total=self.total + others * rise,
            squares=self.squares + 2 * rise * self.total + others * rise**2,
            weighted=self.weighted + rise[:, None] * rest,
        )

    def scores(self) -> np.ndarray:
        r"""[M] float64 monosemanticity of every concept; NaN for those that have none.

        .. math:: MS = \frac{\sum_{i<j} a_i a_j \cos(e_i, e_j)}{\sum_{i<j} a_i a_j}

        with the activations of the concept brought to [0, 1] over the images (Pach et al. 2025, arXiv 2504.02821).
        A concept that is constant over the images, or above its minimum on one of them only, has no pair.
        """
        with_peak = np.sum(self.peak_embedding * self.weighted, axis=-1)
        alike = 2 * self.peak * with_peak + np.sum(self.weighted**2, axis=-1) - self.squares
        pairs = 2 * self.peak * self.total + self.total**2 - self.squares
        defined = self.images - self.at_smallest >= 2
        return np.where(defined, alike / np.where(defined, pairs, 1.0), np.nan)

    def compute(self) -> dict[str, float]:
        """``ms_mean`` and ``ms_max`` over the concepts that have a score, and ``ms_concepts``, how many those are.

        Both are NaN when no concept has one.
        """
        scores = self.scores()
        scores = scores[~np.isnan(scores)]
        nan = float("nan")
        return {
            "ms_mean": float(scores.mean()) if len(scores) else nan,
            "ms_max": float(scores.max()) if len(scores) else nan,
            "ms_concepts": len(scores),
        }
