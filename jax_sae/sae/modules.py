"""The sparse autoencoder: one Flax module, its encoder and activation chosen by the configuration."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_sae.ops import Places, bottleneck, find_places, score_products
from jax_sae.ops.rows import Blocks
from jax_sae.sae.config import SAEConfig
from jax_sae.sae.init import initial_parameters
from jax_sae.sae.selection import ConceptParameters, Selection, activate, candidates, keep, place_scores
from jax_sae.sae.stats import SAEStats

_TINY_NORM = 1e-8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SAEOutput:
    """What a forward pass gives.

    Attributes:
      x_hat: [..., d_in] reconstruction, in the units of the input.
      activations: [..., M] sparse activations; exact zeros where a concept is silent. [..., K] over places.
      scores: [..., M] scores before the activation, after the frequency cap; for gated, of the gates. [..., K] over
        places, 0 in unused ones.
      normalized: [..., d_in] the centred and normalised input that was encoded.
      norm: [..., 1] what the normalised input is multiplied by to give back the centred one.
      y: [..., d_in] reconstruction of ``normalized``; ``x_hat = norm * y + mean``.
      parts: [..., G, d_in] what each of ``config.group_sizes`` adds to ``y``; ``b_dec`` is in none of them.
      indices: None, or over places [..., K] int32, the concept that each stands for, M or above in
        unused places.
      blocks: None, or over places the blocks of those in use.
    """

    x_hat: jax.Array
    activations: jax.Array
    scores: jax.Array
    normalized: jax.Array
    norm: jax.Array
    y: jax.Array
    parts: jax.Array
    indices: jax.Array | None = None
    blocks: Blocks | None = None

    def per_place(self, vector: jax.Array) -> jax.Array:
        """[M] one number for each concept to what broadcasts with ``activations``; 0 in unused places."""
        return _at(vector, self.activations.ndim, self.indices)


class SparseAutoencoder(nnx.Module):
    """A sparse autoencoder with the parameters of ``config`` and nothing else in it.

    MLP (names and layout of the field)::

        scores = score_scale * (u - b_dec) W_enc + b_enc        y = activations W_dec + b_dec

    with a ``threshold`` per concept for jumprelu, and ``b_gate, r_mag, b_mag`` instead of ``b_enc`` for gated.

    Attention over concepts (Sparsemax SAE, CVPR 2026, with keys and values read off the same concepts)::

        scores = score_scale * (u W_Q) (concepts W_K)^T         y = activations (concepts W_V)

    computed as ``((u W_Q) W_K^T) concepts^T`` and ``(activations concepts) W_V``, which never forms the
    [M, d_in] keys and values. ``u`` is the centred, normalised input; the reconstruction is
    ``x_hat = norm * y + mean``. A zero row gives finite numbers.

    Args:
      config: what to compute.
      rngs: the source of the initial parameters (stream ``params``).
      statistics: of the training data, for ``b_dec_init``; see :func:`jax_sae.init_train_state`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from jax_sae import SAEConfig, SparseAutoencoder, init_stats
      >>> config = SAEConfig.preset("sparsemax", d_in=16, n_concepts=64)
      >>> model = SparseAutoencoder(config, rngs=nnx.Rngs(0))
      >>> out = jax.jit(lambda model, x, stats: model(x, stats))(model, jnp.ones((4, 16)), init_stats(config))
      >>> out.x_hat.shape, out.activations.shape
      ((4, 16), (4, 64))
    """

    W_enc: nnx.Param
    W_dec: nnx.Param
    concepts: nnx.Param
    W_Q: nnx.Param
    W_K: nnx.Param
    W_V: nnx.Param
    b_enc: nnx.Param
    b_dec: nnx.Param
    b_gate: nnx.Param
    r_mag: nnx.Param
    b_mag: nnx.Param
    threshold: nnx.Param
    log_alpha: nnx.Param

    def __init__(self, config: SAEConfig, *, rngs: nnx.Rngs, statistics: Any = None):
        self.config = config
        for name, parameter in initial_parameters(config, rngs, statistics).items():
            setattr(self, name, parameter)

    def __call__(
        self, x: jax.Array, stats: SAEStats, *, training: bool = False, axis_name: str | None = None
    ) -> SAEOutput:
        """Encodes and decodes rows.

        Args:
          x: [..., d_in] activations in their own units, any float dtype; computed in float32.
          stats: see :class:`SAEStats`; read, never changed.
          training: BatchTopK selects over the batch; everything else is the same as at evaluation.
          axis_name: the mapped axis that the batch is split over, for that selection.

        Returns:
          SAEOutput, in float32.
        """
        u, norm = self.normalize(x, stats)
        scores = self.scores(u, stats)
        activations = self.select(scores, stats, training=training, axis_name=axis_name)
        return self._output(scores, activations, u, norm, stats, self._decode_parts(activations))

    def _output(
        self,
        scores: jax.Array,
        activations: jax.Array,
        u: jax.Array,
        norm: jax.Array,
        stats: SAEStats,
        parts: jax.Array,
    ) -> SAEOutput:
        y = self.add_b_dec(jnp.sum(parts, axis=-2))
        return SAEOutput(self.denormalize(y, norm, stats), activations, scores, u, norm, y, parts)

    def _decode_parts(self, activations: jax.Array) -> jax.Array:
        """[..., M] activations to [..., G, d_in]."""
        parts, first = [], 0
        for size in self.config.group_sizes:
            group = slice(first, first + size)
            parts.append(self.decode_linear(activations[..., group], group))
            first += size
        return jnp.stack(parts, axis=-2)

    def find_places(self, x: jax.Array, stats: SAEStats, k: int, *, axis_name: str | None = None) -> Places:
        """The concepts of every row that may be active in a training step: its one dense matrix product.

        Args:
          x: [B, d_in] rows.
          stats: see :class:`SAEStats`.
          k: places per row.
          axis_name: see :meth:`__call__`.

        Raises:
          ValueError: topk with fewer places than it keeps.
        """
        if self.config.activation == "topk" and k < min(self.config.k, self.config.n_concepts):
            raise ValueError(f"{k} places per row for topk with k = {self.config.k}; expected at least k")
        selection = Selection(self.config, stats, training=True, axis_name=axis_name)
        parameters, silenced = self._parameters(2), self._silenced(stats, 2)

        def may_be_active(products: jax.Array) -> jax.Array:
            return candidates(selection, place_scores(products, parameters, silenced), parameters)

        query = self.query(self.normalize(x, stats)[0])
        ascending = self.config.activation == "topk"  # among equal scores the first are kept
        places = find_places(query, self.keys(), may_be_active, k, ascending=ascending, dtype=self.config.score_dtype)
        used = places.indices < self.config.n_concepts
        silenced = ~used | self._silenced(stats, 2, places.indices)
        scores = place_scores(places.products, self._parameters(2, places.indices), silenced)
        kept = keep(selection, jnp.where(used, scores, -jnp.inf))
        return places if kept is None else places.narrow(kept)

    def at_places(self, x: jax.Array, stats: SAEStats, places: Places, blocks: Blocks) -> SAEOutput:
        """:meth:`__call__` in training, over places that hold what is active in every row: the same numbers.

        Args:
          x: [B, d_in] rows.
          stats: see :class:`SAEStats`.
          places: from :meth:`find_places`.
          blocks: of these places, all that are in use.

        Returns:
          SAEOutput over places.
        """
        config, indices = self.config, places.indices
        used = indices < config.n_concepts

        def scores_and_activations(extras: tuple, products: jax.Array) -> tuple[jax.Array, jax.Array]:
            parameters, silenced, used = extras
            scores = place_scores(products, parameters, silenced)
            compared = jnp.where(used, scores, -jnp.inf) if config.values == "probabilities" else scores
            return scores, activate(config, compared, used, parameters)

        u, norm = self.normalize(x, stats)
        extras = self._parameters(2, indices), ~used | self._silenced(stats, 2, indices), used
        values = None if config.encoder == "attention" else self.W_dec[...]
        parts, scores, activations = bottleneck(
            scores_and_activations, config.group_sizes, extras, self.query(u), self.keys(), values, places, blocks
        )
        if config.encoder == "attention":
            parts = parts @ self.W_V[...]
        output = self._output(scores, activations, u, norm, stats, parts)
        return dataclasses.replace(output, indices=indices, blocks=blocks)

    def encode(self, x: jax.Array, stats: SAEStats) -> jax.Array:
        """[..., d_in] rows to [..., M] activations, as at evaluation."""
        u, _ = self.normalize(x, stats)
        return self.select(self.scores(u, stats), stats)

    def decode(self, activations: jax.Array, stats: SAEStats, norm: jax.Array | None = None) -> jax.Array:
        """[..., M] activations to [..., d_in] rows in the data's units.

        Args:
          activations: [..., M].
          stats: for the mean that is added back and the scale.
          norm: [..., 1] norms of the centred inputs (``SAEOutput.norm``), needed with ``"unit_norm"``.
        """
        if norm is None:
            if self.config.normalize_input == "unit_norm":
                raise ValueError("decode needs norm, the norm of each centred input row, with unit_norm inputs")
            norm = jnp.ones((1,) * activations.ndim) / stats.scale
        y = self.add_b_dec(jnp.sum(self._decode_parts(activations), axis=-2))
        return self.denormalize(y, norm, stats)

    def normalize(self, x: jax.Array, stats: SAEStats) -> tuple[jax.Array, jax.Array]:
        """(u [..., d_in], norm [..., 1]) with ``u * norm + mean = x``; the norm of a zero row is tiny, not 0."""
        centred = x.astype(jnp.float32) - _as_row(stats.mean, x.ndim)
        if self.config.normalize_input == "unit_norm":
            norm = jnp.sqrt(jnp.sum(centred**2, axis=-1, keepdims=True))
            norm = jnp.maximum(norm, _TINY_NORM)
        else:
            norm = jnp.ones((*x.shape[:-1], 1)) / stats.scale
        return centred / norm, norm

    def add_b_dec(self, y: jax.Array) -> jax.Array:
        """[..., d_in] sums of decoder rows to reconstructions in normalised units."""
        return y + _as_row(self.b_dec[...], y.ndim) if self.config.encoder == "mlp" else y

    def denormalize(self, y: jax.Array, norm: jax.Array, stats: SAEStats) -> jax.Array:
        """[..., d_in] reconstructions in normalised units to the data's: scaled by ``norm``, the mean added."""
        return y * norm + _as_row(stats.mean, y.ndim)

    def query(self, u: jax.Array) -> jax.Array:
        """[..., d_in] normalised rows to what is multiplied with the keys: products and bias make the scores."""
        config = self.config
        if config.encoder == "attention":
            projected = u @ self.W_Q[...] if config.query_projection else u
            return projected @ self.W_K[...].T * config.score_scale
        centred = u - _as_row(self.b_dec[...], u.ndim) if config.apply_b_dec_to_input else u
        return centred * config.score_scale

    def keys(self) -> jax.Array:
        """[M, d_in] the row that each concept is recognised by."""
        return self.concepts[...] if self.config.encoder == "attention" else self.W_enc[...].T

    def scores(self, u: jax.Array, stats: SAEStats, concepts: jax.Array | None = None) -> jax.Array:
        """[..., M] scores of normalised rows ``u [..., d_in]``, with the frequency cap applied.

        ``concepts [n] int32`` asks for the scores of these alone, [..., n].
        """
        keys = self.keys() if concepts is None else self.keys()[concepts]
        row = None if concepts is None else concepts.reshape((1,) * (u.ndim - 1) + concepts.shape)
        silenced = self._silenced(stats, u.ndim, row)
        products = score_products(self.query(u), keys, self.config.score_dtype)
        return place_scores(products, self._parameters(u.ndim, row), silenced)

    def select(
        self, scores: jax.Array, stats: SAEStats, *, training: bool = False, axis_name: str | None = None
    ) -> jax.Array:
        """[..., M] scores to activations: exact zeros where a concept is silent.

        Derivatives: see :func:`jax_sae.sae.selection.activate`.
        """
        kept = keep(Selection(self.config, stats, training, axis_name), scores)
        return activate(self.config, scores, kept, self._parameters(scores.ndim))

    def alpha(self) -> jax.Array:
        """[] of entmax: the parameter, or the setting."""
        return 1 + jnp.exp(self.log_alpha[...]) if self.config.learn_alpha else jnp.float32(self.config.alpha)

    def _parameters(self, ndim: int, indices: jax.Array | None = None) -> ConceptParameters:
        """Of all concepts, as rows that broadcast with ``ndim`` dimensions, or of those at ``indices``."""
        activation = self.config.activation
        zero = jnp.zeros((1,) * ndim)
        at = lambda vector: _at(vector[...], ndim, indices)  # noqa: E731
        gated = activation == "gated"
        bias = zero if self.config.encoder == "attention" else at(self.b_gate if gated else self.b_enc)
        return ConceptParameters(
            bias=bias,
            threshold=at(self.threshold) if activation == "jumprelu" else zero,
            rate=at(self.r_mag) if gated else zero,
            magnitude=at(self.b_mag) if gated else zero,
            alpha=self.alpha(),
        )

    def _silenced(self, stats: SAEStats, ndim: int, indices: jax.Array | None = None) -> jax.Array:
        """The concepts that fire more often than the frequency cap, as :meth:`_parameters` has them."""
        if self.config.frequency_cap is None:
            return jnp.zeros((1,) * ndim, bool)
        return _at(stats.frequency > self.config.frequency_cap, ndim, indices)

    def decode_linear(self, activations: jax.Array, concepts: slice = slice(None)) -> jax.Array:
        """[..., m] activations of ``concepts`` times their decoder rows, without ``b_dec``: [..., d_in]."""
        if self.config.encoder == "attention":
            return (activations @ self.concepts[concepts]) @ self.W_V[...]
        return activations @ self.W_dec[concepts]

    def decoder(self) -> jax.Array:
        """[M, d_in] rows that activations are multiplied by: ``W_dec``, or ``concepts W_V``."""
        if self.config.encoder == "attention":
            return self.concepts[...] @ self.W_V[...]
        return self.W_dec[...]

    def decoder_norms(self) -> jax.Array:
        """[M] norms of the decoder rows."""
        return jnp.linalg.norm(self.decoder(), axis=-1)


def _as_row(vector: jax.Array, ndim: int) -> jax.Array:
    """[n] to [1, ..., 1, n], so that broadcasting is explicit."""
    return vector.reshape((1,) * (ndim - 1) + vector.shape)


def _at(vector: jax.Array, ndim: int, indices: jax.Array | None) -> jax.Array:
    """[n] to what broadcasts with scores of all n concepts, or of those at ``indices``; 0 at an index of n."""
    if indices is None:
        return _as_row(vector, ndim)
    return jnp.take(vector, indices, mode="fill", fill_value=0)
