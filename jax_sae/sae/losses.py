"""Training losses: reconstruction, L1 and AuxK."""

import jax
import jax.numpy as jnp

from jax_sae.ops import top_k_mask
from jax_sae.sae.config import SAEConfig
from jax_sae.sae.modules import SAEOutput, SparseAutoencoder
from jax_sae.sae.stats import SAEStats, dead_concepts


def sae_loss(
    model: SparseAutoencoder,
    stats: SAEStats,
    x: jax.Array,
    step: jax.Array | int,
    *,
    training: bool = True,
    axis_name: str | None = None,
) -> tuple[jax.Array, tuple[SAEOutput, dict[str, jax.Array]]]:
    """The loss that ``model.config`` describes.

    Args:
      model: the autoencoder.
      stats: its statistics.
      x: [B, d_in] rows.
      step: [] training step, for the warm-up of L1.
      training: see :meth:`SparseAutoencoder.__call__`.
      axis_name: the mapped axis that the batch is split over. The loss stays this device's own; the mean
        over devices of its gradient is the gradient of the whole batch's loss.

    Returns:
      (loss [], (forward pass, named terms of the loss [])).
    """
    config = model.config
    output = model(x, stats, training=training, axis_name=axis_name)
    terms = {"reconstruction": reconstruction_loss(config, output, x)}
    if config.l1_coefficient:
        warmup = jnp.minimum(1.0, (step + 1) / max(config.l1_warmup_steps, 1))
        terms["l1"] = config.l1_coefficient * warmup * l1_norm(model, output.activations)
    if config.aux_k and training:
        terms["aux"] = config.aux_coefficient * auxiliary_loss(model, stats, output, x, axis_name)
    return sum(terms.values(), jnp.float32(0)), (output, terms)


def reconstruction_loss(config: SAEConfig, output: SAEOutput, x: jax.Array) -> jax.Array:
    """[] mean over rows of the reconstruction error, in the form ``config.loss`` names."""
    error = output.x_hat - x.astype(jnp.float32)
    if config.loss == "mse_over_norm":
        return config.loss_scale * jnp.mean(error**2 / output.norm)
    squared = jnp.sum((error / output.norm) ** 2, axis=-1)
    if config.loss == "mse":
        squared = squared / config.d_in
    return config.loss_scale * jnp.mean(squared)


def l1_norm(model: SparseAutoencoder, activations: jax.Array) -> jax.Array:
    """[] mean over rows of the L1 norm of ``activations [B, M]``, or of what they contribute (``config.l1_of``)."""
    sizes = jnp.mean(jnp.abs(activations), axis=0)
    if model.config.l1_of == "contributions":
        sizes = sizes * model.decoder_norms()
    return jnp.sum(sizes)


def auxiliary_loss(
    model: SparseAutoencoder, stats: SAEStats, output: SAEOutput, x: jax.Array, axis_name: str | None = None
) -> jax.Array:
    """[] AuxK: how well the ``aux_k`` strongest dead concepts explain what the others left over.

    The residual is a constant in the gradient; the error is relative to the variance of the residual over
    the batch (Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.4 and appendix A.2).
    0 while no concept is dead; nothing is computed then.
    """
    dead = dead_concepts(model.config, stats)
    residual = jax.lax.stop_gradient((x.astype(jnp.float32) - output.x_hat) / output.norm)

    def with_dead(scores: jax.Array) -> jax.Array:
        candidates = jnp.where(dead[None, :], jax.nn.relu(scores), 0.0)
        chosen = top_k_mask(jax.lax.stop_gradient(candidates), model.config.aux_k)
        explained = model.decode_linear(jnp.where(chosen, candidates, 0.0))
        error = jnp.mean(jnp.sum((residual - explained) ** 2, axis=-1))
        return error / jnp.maximum(_variance(residual, axis_name), jnp.finfo(jnp.float32).tiny)

    return jax.lax.cond(jnp.any(dead), with_dead, lambda _: jnp.float32(0), output.scores)


def _variance(rows: jax.Array, axis_name: str | None) -> jax.Array:
    """[] mean squared distance of ``rows [B, d]`` from their mean, over the whole batch."""

    def batch_mean(value: jax.Array) -> jax.Array:
        return value if axis_name is None else jax.lax.pmean(value, axis_name)

    centre = batch_mean(jnp.mean(rows, axis=0, keepdims=True))
    return batch_mean(jnp.mean(jnp.sum((rows - centre) ** 2, axis=-1)))
