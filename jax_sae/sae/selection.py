"""Which concepts of an input are active, and how strongly: one rule for all scores and for scores at some places."""

import dataclasses

import jax
import jax.numpy as jnp

from jax_sae.ops import (
    batch_top_k_threshold,
    entmax,
    group_maxima,
    jump_relu,
    sparsemax,
    sparsemax_threshold,
    top_k_mask,
    top_k_threshold,
)
from jax_sae.sae.config import SAEConfig
from jax_sae.sae.stats import SAEStats

_SLACK = 1e-5  # relative: what rounding may take off a bound


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConceptParameters:
    """What the activation of a concept depends on besides its score, broadcastable with the scores.

    Attributes:
      bias: added to the product of query and key; 0 without one.
      threshold: of jumprelu.
      rate: of gated, ``r_mag``.
      magnitude: of gated, ``b_mag``.
      alpha: [] of entmax.
    """

    bias: jax.Array
    threshold: jax.Array
    rate: jax.Array
    magnitude: jax.Array
    alpha: jax.Array


@dataclasses.dataclass(frozen=True)
class Selection:
    """How a batch is selected from.

    Attributes:
      config: the autoencoder.
      stats: its statistics.
      training: BatchTopK selects over the batch, and by its running threshold otherwise.
      axis_name: the mapped axis that the batch is split over, for that.
    """

    config: SAEConfig
    stats: SAEStats
    training: bool = False
    axis_name: str | None = None

    def batch_count(self, rows: int) -> jax.Array:
        """[] how many scores of the whole batch BatchTopK keeps, ``rows`` of it here."""
        devices = 1 if self.axis_name is None else jax.lax.axis_size(self.axis_name)
        return jnp.minimum(self.stats.k, self.config.k) * rows * devices


def keep(selection: Selection, scores: jax.Array) -> jax.Array | None:
    """[..., n] bool, a constant to differentiation: the concepts that the selection rule lets through.

    None where the activation function decides by itself.

    Args:
      selection: the rule.
      scores: [..., n] of all concepts, or of those that may be active, in ascending order for topk; -inf is never kept
        as active.
    """
    config, fixed = selection.config, jax.lax.stop_gradient(scores)
    match config.activation:
        case "sparsemax" | "entmax" if config.values == "probabilities":
            return None
        case "sparsemax":
            return fixed > sparsemax_threshold(fixed)[0][..., None]
        case "entmax":
            return entmax(fixed, config.alpha) > 0
        case "gated":
            return fixed > 0
        case "topk":
            return top_k_mask(fixed, config.k, selection.stats.k)
        case "batch_topk":
            return _keep_of_batch(selection, jax.nn.relu(fixed))
    return None


def _keep_of_batch(selection: Selection, positive: jax.Array) -> jax.Array:
    if not selection.training:
        return positive > selection.stats.threshold
    flat = positive.reshape(-1, positive.shape[-1])
    count = selection.batch_count(flat.shape[0])
    return positive >= batch_top_k_threshold(flat, count, axis_name=selection.axis_name)


def activate(config: SAEConfig, scores: jax.Array, kept: jax.Array | None, parameters: ConceptParameters) -> jax.Array:
    """[..., n] scores to activations: exact zeros where a concept is silent.

    Derivatives: the selection is a constant, so an active concept passes its gradient and a silent one none, but for
    ``"probabilities"``, which have the Jacobian of their projection, and for the thresholds of
    :func:`jax_sae.jump_relu`.

    Args:
      config: the autoencoder.
      scores: [..., n]; for probabilities -inf where there is no concept.
      kept: from :func:`keep`.
      parameters: of the same concepts.
    """
    match config.activation:
        case "sparsemax" | "entmax" if config.values == "probabilities":
            return sparsemax(scores) if config.activation == "sparsemax" else entmax(scores, parameters.alpha)
        case "sparsemax" | "entmax":
            sizes = scores
        case "jumprelu":
            sizes = jump_relu(scores, parameters.threshold, config.bandwidth)
        case "gated":
            sizes = jax.nn.relu(jnp.exp(parameters.rate) * (scores - parameters.bias) + parameters.magnitude)
        case _:
            sizes = jax.nn.relu(scores)
    return sizes if kept is None else jnp.where(kept, sizes, 0.0)


def candidates(selection: Selection, scores: jax.Array, parameters: ConceptParameters) -> jax.Array:
    """[B, M] bool: every concept that may be active, or whose parameters may get a gradient, and few others.

    A row of maxima over groups of its concepts has few entries and a threshold that is a lower bound of the row's own:
    what does not pass that one is not active. NaN always passes.

    Args:
      selection: the rule.
      scores: [B, M].
      parameters: of all concepts.
    """
    config = selection.config
    match config.activation:
        case "sparsemax":
            bound = sparsemax_threshold(group_maxima(scores))[0][:, None]
        case "entmax":
            bound = _entmax_bound(group_maxima(scores), parameters.alpha)
        case "jumprelu":
            return ~(scores <= parameters.threshold - config.bandwidth / 2)
        case "topk":
            bound = _top_k_bound(selection, scores)
        case "batch_topk":
            bound = _batch_top_k_bound(selection, scores)
        case _:
            return ~(scores <= 0)
    passed = ~(scores < bound - _SLACK * (1 + jnp.abs(bound)))
    return passed & ~(scores <= 0) if config.activation in ("topk", "batch_topk") else passed


def _entmax_bound(maxima: jax.Array, alpha: jax.Array) -> jax.Array:
    """[B, 1] the score at which the probability of ``maxima`` reaches 0."""
    top = jnp.max(maxima, axis=-1, keepdims=True)
    largest = jnp.max(entmax(maxima, alpha), axis=-1, keepdims=True)
    return top - largest ** (alpha - 1) / (alpha - 1)


def _top_k_bound(selection: Selection, scores: jax.Array) -> jax.Array:
    """[B, 1] the k-th largest maximum: at least k scores reach it. 0 where there are fewer groups."""
    maxima, k = group_maxima(scores), selection.config.k
    if maxima.shape[-1] < k:
        return jnp.zeros_like(scores[:, :1])
    return top_k_threshold(maxima, k)[:, None]


def _batch_top_k_bound(selection: Selection, scores: jax.Array) -> jax.Array:
    """[1, 1] as :func:`_top_k_bound`, over the whole batch."""
    maxima = group_maxima(scores)
    if maxima.shape[-1] < selection.config.k:
        return jnp.zeros_like(scores[:1, :1])
    count = selection.batch_count(len(scores))
    return batch_top_k_threshold(jax.nn.relu(maxima), count, axis_name=selection.axis_name)[None, None]


def place_scores(products: jax.Array, parameters: ConceptParameters, silenced: jax.Array) -> jax.Array:
    """Products of query and key to scores: the bias added, 0 where a concept is silenced."""
    return jnp.where(silenced, 0.0, products + parameters.bias)
