"""Training losses: reconstruction, the sparsity penalties of the field, and what keeps concepts alive."""

import jax
import jax.numpy as jnp

from jax_sae.ops import step_above, top_k_mask
from jax_sae.ops.codes import decode_places
from jax_sae.sae.config import SAEConfig
from jax_sae.sae.modules import SAEOutput, SparseAutoencoder
from jax_sae.sae.stats import SAEStats, dead_concepts


def sae_loss(
    model: SparseAutoencoder,
    stats: SAEStats,
    x: jax.Array,
    step: jax.Array | int,
    *,
    row_weights: jax.Array | None = None,
    training: bool = True,
    axis_name: str | None = None,
) -> tuple[jax.Array, tuple[SAEOutput, dict[str, jax.Array]]]:
    """The loss that ``model.config`` describes.

    Args:
      model: the autoencoder.
      stats: its statistics.
      x: [B, d_in] rows.
      step: [] training step, for the warm-up of the sparsity penalty.
      row_weights: [B] factors on the reconstruction error of every row, to make the CLS token of an image count
        more, say; 1 without it.
      training: see :meth:`SparseAutoencoder.__call__`.
      axis_name: the mapped axis that the batch is split over. The loss stays this device's own; the mean
        over devices of its gradient is the gradient of the whole batch's loss.

    Returns:
      (loss [], (forward pass, named terms of the loss [])).
    """
    output = model(x, stats, training=training, axis_name=axis_name)
    terms = main_terms(model, output, step, row_weights=row_weights, axis_name=axis_name)
    if training:
        dead = dead_concepts(model.config, stats)
        residual = jax.lax.stop_gradient(output.normalized - output.y)
        terms |= dead_terms(model, output.scores, dead, residual, axis_name)
    return sum(terms.values(), jnp.float32(0)), (output, terms)


def main_terms(
    model: SparseAutoencoder,
    output: SAEOutput,
    step: jax.Array | int,
    *,
    row_weights: jax.Array | None = None,
    axis_name: str | None = None,
) -> dict[str, jax.Array]:
    """The terms of :func:`sae_loss` that come from active concepts, of a forward pass over all or over places."""
    config = model.config
    terms = {"reconstruction": reconstruction_loss(model, output, row_weights)}
    if config.sparsity_coefficient:
        warmup = jnp.minimum(1.0, (step + 1) / max(config.sparsity_warmup_steps, 1))
        terms["sparsity"] = config.sparsity_coefficient * warmup * sparsity_penalty(model, output, axis_name)
    if config.activation == "gated":
        terms["gate"] = gate_loss(model, output)
    return terms


def dead_terms(
    model: SparseAutoencoder, scores: jax.Array, dead: jax.Array, residual: jax.Array, axis_name: str | None = None
) -> dict[str, jax.Array]:
    """The terms of :func:`sae_loss` that come from dead concepts.

    Args:
      model: the autoencoder, or a part of one (:func:`jax_sae.sae.subset.take_concepts`).
      scores: [B, M] of its concepts.
      dead: [M] bool.
      residual: [B, d_in] what the active concepts left over, in normalised units; a constant.
      axis_name: the mapped axis that the batch is split over.
    """
    config, terms = model.config, {}
    if config.pre_activation_coefficient:
        terms["pre_activation"] = config.pre_activation_coefficient * pre_activation_loss(model, scores, dead)
    if config.aux_k:
        terms["aux"] = config.aux_coefficient * auxiliary_loss(model, scores, dead, residual, axis_name)
    return terms


def reconstruction_loss(model: SparseAutoencoder, output: SAEOutput, row_weights: jax.Array | None = None) -> jax.Array:
    """[] mean over rows of the reconstruction error in the form ``config.loss`` names, and over Matryoshka prefixes."""
    prefixes = jnp.cumsum(output.parts, axis=-2)
    errors = [
        _error(model.config, output, model.add_b_dec(prefixes[..., group, :]), row_weights)
        for group in range(prefixes.shape[-2])
    ]
    return sum(errors, jnp.float32(0)) / len(errors)


def _error(config: SAEConfig, output: SAEOutput, y: jax.Array, row_weights: jax.Array | None = None) -> jax.Array:
    """The error of ``y`` as a reconstruction of the normalised rows: no digit is lost to a mean that is far from 0."""
    rows = jnp.sum((y - output.normalized) ** 2, axis=-1)
    if config.loss != "squared_error":
        rows = rows / config.d_in
    if config.loss == "mse_over_norm":
        rows = rows * _squared_norm_over_length(config, output)
    return config.loss_scale * jnp.mean(rows if row_weights is None else rows * row_weights)


def _squared_norm_over_length(config: SAEConfig, output: SAEOutput) -> jax.Array:
    """[...] what takes a squared error back to the data's units and divides it by the length of the centred row."""
    norm = output.norm[..., 0]
    if config.normalize_input == "unit_norm":
        return norm
    length = jnp.linalg.norm(output.normalized, axis=-1) * norm
    return norm**2 / jnp.maximum(length, jnp.finfo(jnp.float32).tiny)


def sparsity_penalty(model: SparseAutoencoder, output: SAEOutput, axis_name: str | None = None) -> jax.Array:
    """[] what ``config.sparsity_loss`` names, summed over concepts and averaged over rows [B, M].

    The distance to ``target_l0`` is that of the whole batch over ``axis_name``; its gradient is this device's part.
    """
    config = model.config
    if config.sparsity_loss == "l0":
        active = step_above(output.scores, output.per_place(model.threshold[...]), config.bandwidth)
        count = jnp.mean(jnp.sum(active, axis=-1))
        if config.target_l0 is None:
            return count
        if axis_name is not None:
            count = count + jax.lax.stop_gradient(jax.lax.pmean(count, axis_name) - count)
        return (count / config.target_l0 - 1) ** 2
    sizes = jax.nn.relu(output.scores) if config.activation == "gated" else jnp.abs(output.activations)
    if config.sparsity_of == "contributions":
        sizes = sizes * output.per_place(model.decoder_norms())
    if config.sparsity_loss == "tanh":
        sizes = jnp.tanh(config.tanh_scale * sizes)
    return jnp.mean(jnp.sum(sizes, axis=-1))


def gate_loss(model: SparseAutoencoder, output: SAEOutput) -> jax.Array:
    """[] reconstruction error from the open gates alone, the decoder a constant: what trains the gates.

    Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders" (arXiv 2404.16014),
    equation 8.
    """
    rows, bias = (jax.lax.stop_gradient(w[...]) for w in (model.W_dec, model.b_dec))
    gates = jax.nn.relu(output.scores)
    if output.indices is None or output.blocks is None:  # they are None together
        decoded = gates @ rows
    else:
        decoded = decode_places(gates, output.indices, output.blocks, rows)
    return _error(model.config, output, decoded + bias[None, :])


def pre_activation_loss(model: SparseAutoencoder, scores: jax.Array, dead: jax.Array) -> jax.Array:
    """[] how far the scores of dead concepts stay below their thresholds, weighted with their decoder rows' norms."""
    weights = jnp.where(dead, model.decoder_norms(), 0.0)
    below = jax.nn.relu(model.threshold[...][None, :] - scores)
    return jnp.sum(jnp.mean(below, axis=0) * weights)


def auxiliary_loss(
    model: SparseAutoencoder, scores: jax.Array, dead: jax.Array, residual: jax.Array, axis_name: str | None = None
) -> jax.Array:
    """[] AuxK: how well the ``aux_k`` strongest dead concepts explain what the others left over.

    The error is relative to the variance of the residual over the batch (Gao et al. 2024, "Scaling and evaluating
    sparse autoencoders", section 2.4 and appendix A.2). 0 while no concept is dead; nothing is computed then.
    """

    def with_dead(scores: jax.Array) -> jax.Array:
        candidates = jnp.where(dead[None, :], jax.nn.relu(scores), 0.0)
        chosen = top_k_mask(jax.lax.stop_gradient(candidates), model.config.aux_k)
        explained = model.decode_linear(jnp.where(chosen, candidates, 0.0))
        error = jnp.mean(jnp.sum((residual - explained) ** 2, axis=-1))
        return error / jnp.maximum(_variance(residual, axis_name), jnp.finfo(jnp.float32).tiny)

    return jax.lax.cond(jnp.any(dead), with_dead, lambda _: jnp.float32(0), scores)


def _variance(rows: jax.Array, axis_name: str | None) -> jax.Array:
    """[] mean squared distance of ``rows [B, d]`` from their mean, over the whole batch."""

    def batch_mean(value: jax.Array) -> jax.Array:
        return value if axis_name is None else jax.lax.pmean(value, axis_name)

    centre = batch_mean(jnp.mean(rows, axis=0, keepdims=True))
    return batch_mean(jnp.mean(jnp.sum((rows - centre) ** 2, axis=-1)))
