"""The sparse autoencoder: one Flax module, its encoder and activation chosen by the configuration."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_sae.ops import batch_top_k_threshold, entmax, jump_relu, sparsemax, sparsemax_threshold, top_k_mask
from jax_sae.sae.config import SAEConfig
from jax_sae.sae.stats import SAEStats, init_stats

_TINY_NORM = 1e-8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SAEOutput:
    """What a forward pass gives.

    Attributes:
      x_hat: [..., d_in] reconstruction, in the units of the input.
      activations: [..., M] sparse activations; exact zeros where a concept is silent.
      scores: [..., M] scores before the activation, after the frequency cap; for gated, of the gates.
      normalized: [..., d_in] the centred and normalised input that was encoded.
      norm: [..., 1] what the normalised input is multiplied by to give back the centred one.
      y: [..., d_in] reconstruction of ``normalized``; ``x_hat = norm * y + mean``.
    """

    x_hat: jax.Array
    activations: jax.Array
    scores: jax.Array
    normalized: jax.Array
    norm: jax.Array
    y: jax.Array


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

    def __init__(self, config: SAEConfig, *, rngs: nnx.Rngs, statistics: Any = None):
        self.config = config
        if config.encoder == "attention":
            self._init_attention(rngs)
        else:
            self._init_mlp(rngs, statistics)
        if config.activation == "jumprelu":
            self.threshold = nnx.Param(jnp.full(config.n_concepts, config.threshold_init))
        if config.learn_alpha:
            self.log_alpha = nnx.Param(jnp.log(jnp.float32(config.alpha - 1)))

    def _init_attention(self, rngs: nnx.Rngs) -> None:
        """What ``config.attention_init`` names; Kaiming's fan_in is M for the concepts and d for the projections."""
        d, m = self.config.d_in, self.config.n_concepts
        identity = self.config.attention_init == "identity"

        def projection(scale: float = 1.0) -> nnx.Param:
            return nnx.Param(scale * jnp.eye(d) if identity else _kaiming_uniform(rngs.params(), (d, d), fan_in=d))

        key = rngs.params()
        self.concepts = nnx.Param(
            _random_directions(key, (m, d)) if identity else _kaiming_uniform(key, (m, d), fan_in=m)
        )
        self.W_K = projection()
        self.W_V = projection(self._value_norm())
        if self.config.query_projection:
            self.W_Q = projection()

    def _value_norm(self) -> float:
        """The length that values begin at, so that the first reconstruction has that of the input.

        Raw scores carry ``score_scale``; probabilities add up to 1.
        """
        config = self.config
        if config.values == "scores":
            return 1 / config.score_scale
        return config.d_in**0.5 if config.normalize_input == "mean_norm" else 1.0

    def _init_mlp(self, rngs: nnx.Rngs, statistics: Any) -> None:
        """Random unit decoder rows, the encoder their transpose, b_dec at the centre of the data."""
        d, m = self.config.d_in, self.config.n_concepts
        rows = _random_directions(rngs.params(), (m, d))
        self.W_enc = nnx.Param(jnp.array(rows.T))
        if self.config.activation == "gated":
            self.b_gate, self.r_mag, self.b_mag = (nnx.Param(jnp.zeros(m)) for _ in range(3))
        else:
            self.b_enc = nnx.Param(jnp.zeros(m))
        self.W_dec = nnx.Param(rows)
        self.b_dec = nnx.Param(_initial_b_dec(self.config, statistics))

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
        y = self.add_b_dec(self.decode_linear(activations))
        return SAEOutput(self.denormalize(y, norm, stats), activations, scores, u, norm, y)

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
        return self.denormalize(self.add_b_dec(self.decode_linear(activations)), norm, stats)

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

    def scores(self, u: jax.Array, stats: SAEStats) -> jax.Array:
        """[..., M] scores of normalised rows ``u [..., d_in]``, with the frequency cap applied."""
        config = self.config
        if config.encoder == "attention":
            query = u @ self.W_Q[...] if config.query_projection else u
            z = (query @ self.W_K[...].T) @ self.concepts[...].T * config.score_scale
        else:
            bias = self.b_gate if config.activation == "gated" else self.b_enc
            query = u - _as_row(self.b_dec[...], u.ndim) if config.apply_b_dec_to_input else u
            z = query @ self.W_enc[...] * config.score_scale + _as_row(bias[...], u.ndim)
        if config.frequency_cap is None:
            return z
        return jnp.where(_as_row(stats.frequency > config.frequency_cap, z.ndim), 0.0, z)

    def select(
        self, scores: jax.Array, stats: SAEStats, *, training: bool = False, axis_name: str | None = None
    ) -> jax.Array:
        """[..., M] scores to activations: exact zeros where a concept is silent.

        Derivatives: the selection is a constant, so an active concept passes its gradient and a silent one
        none, but for ``"probabilities"``, which have the Jacobian of their projection, and for the thresholds of
        :func:`jax_sae.jump_relu`.
        """
        config = self.config
        fixed = jax.lax.stop_gradient(scores)
        match config.activation:
            case "sparsemax" | "entmax" if config.values == "probabilities":
                return sparsemax(scores) if config.activation == "sparsemax" else entmax(scores, self.alpha())
            case "sparsemax":
                return jnp.where(fixed > sparsemax_threshold(fixed)[0][..., None], scores, 0.0)
            case "entmax":
                return jnp.where(entmax(fixed, config.alpha) > 0, scores, 0.0)
            case "jumprelu":
                return jump_relu(scores, _as_row(self.threshold[...], scores.ndim), config.bandwidth)
            case "gated":
                return jnp.where(scores > 0, jax.nn.relu(self.magnitudes(scores)), 0.0)
        positive = jax.nn.relu(scores)
        if config.activation == "topk":
            return jnp.where(top_k_mask(fixed, config.k, stats.k), positive, 0.0)
        if config.activation == "batch_topk":
            return jnp.where(self._batch_top_k_mask(positive, stats, training, axis_name), positive, 0.0)
        return positive

    def alpha(self) -> jax.Array:
        """[] of entmax: the parameter, or the setting."""
        return 1 + jnp.exp(self.log_alpha[...]) if self.config.learn_alpha else jnp.float32(self.config.alpha)

    def magnitudes(self, gates: jax.Array) -> jax.Array:
        """[..., M] gate scores to what an open gate lets through, before its ReLU (Rajamanoharan et al. 2024)."""
        gate, rate, bias = (_as_row(b[...], gates.ndim) for b in (self.b_gate, self.r_mag, self.b_mag))
        return jnp.exp(rate) * (gates - gate) + bias

    def _batch_top_k_mask(
        self, positive: jax.Array, stats: SAEStats, training: bool, axis_name: str | None
    ) -> jax.Array:
        if not training:
            return positive > stats.threshold
        flat = jax.lax.stop_gradient(positive.reshape(-1, positive.shape[-1]))
        devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
        count = jnp.minimum(stats.k, self.config.k) * flat.shape[0] * devices
        return positive >= batch_top_k_threshold(flat, count, axis_name=axis_name)

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


def _random_directions(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Random directions."""
    rows = jax.random.normal(key, shape)
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def _kaiming_uniform(key: jax.Array, shape: tuple[int, int], fan_in: int) -> jax.Array:
    bound = (6 / fan_in) ** 0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _initial_b_dec(config: SAEConfig, statistics: Any) -> jax.Array:
    """The chosen centre of the data, in normalised units."""
    if statistics is None or config.b_dec_init == "zeros" or config.normalize_input == "unit_norm":
        return jnp.zeros(config.d_in)
    stats = init_stats(config, statistics)
    return (jnp.asarray(getattr(statistics, config.b_dec_init), jnp.float32) - stats.mean) * stats.scale
