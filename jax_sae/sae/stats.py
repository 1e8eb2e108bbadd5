"""Everything a sparse autoencoder keeps that is not a parameter: explicit, and frozen at evaluation."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_sae.sae.config import SAEConfig

MAX_ROWS_SINCE_FIRED = 2**30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SAEStats:
    """Statistics of the data and of the firing of concepts. Training updates them, evaluation never does.

    Attributes:
      mean: [d_in] float32, what ``center_input`` subtracts; zeros without it.
      scale: [] float32, the factor of ``normalize_input="mean_norm"``; 1 without it.
      frequency: [M] float32, running mean over training steps of the fraction of rows a concept fires on.
      rows_since_fired: [M] int32, rows since a concept last fired; it stops counting at 2**30.
      threshold: [] float32, BatchTopK's inference threshold; negative until the first training step.
      steps: [] int32, training steps that went into ``frequency``.
      k: [] int32, how many concepts topk and batch_topk keep; ``config.k`` at the start. It may be lowered (annealed,
        or swept by :func:`jax_sae.sweep_train_step`); ``config.k`` stays the most that are kept.
    """

    mean: jax.Array
    scale: jax.Array
    frequency: jax.Array
    rows_since_fired: jax.Array
    threshold: jax.Array
    steps: jax.Array
    k: jax.Array


def init_stats(config: SAEConfig, statistics: Any = None) -> SAEStats:
    """Fresh :class:`SAEStats` for ``config``.

    Args:
      config: the autoencoder.
      statistics: of the training data, with ``mean [d_in]``, ``mean_norm`` (mean distance from the mean) and
        ``raw_mean_norm`` (mean norm), as :class:`jax_sae.data.Statistics` has them. Without it the mean is 0 and
        the scale 1: the data are taken to be centred and scaled already.
    """
    mean, scale = jnp.zeros(config.d_in), jnp.ones(())
    if statistics is not None:
        if config.center_input:
            mean = jnp.asarray(statistics.mean, jnp.float32)
        if config.normalize_input == "mean_norm":
            norm = statistics.mean_norm if config.center_input else statistics.raw_mean_norm
            scale = jnp.float32(math.sqrt(config.d_in) / norm if norm > 0 else 1.0)
    return SAEStats(
        mean=mean,
        scale=scale,
        frequency=jnp.zeros(config.n_concepts),
        rows_since_fired=jnp.zeros(config.n_concepts, jnp.int32),
        threshold=jnp.float32(-1.0),
        steps=jnp.int32(0),
        k=jnp.int32(config.k),
    )


def update_stats(
    config: SAEConfig, stats: SAEStats, activations: jax.Array, *, axis_name: str | None = None
) -> SAEStats:
    """The statistics after one training batch.

    Args:
      config: the autoencoder.
      stats: the statistics before the batch.
      activations: [B, M] activations of the batch; of this device's part of it when ``axis_name`` is given.
      axis_name: the mapped axis that the batch is split over.
    """
    rows = jnp.int32(activations.shape[0])
    firing = jnp.sum(activations > 0, axis=0, dtype=jnp.int32)
    if axis_name is not None:
        rows, firing = jax.lax.psum((rows, firing), axis_name)
    seen = stats.steps.astype(jnp.float32)
    frequency = (stats.frequency * seen + firing / rows) / (seen + 1)
    silent = jnp.minimum(stats.rows_since_fired, MAX_ROWS_SINCE_FIRED - rows) + rows
    threshold = stats.threshold
    if config.activation == "batch_topk":
        threshold = _running_threshold(config, threshold, activations, axis_name)
    return dataclasses.replace(
        stats,
        frequency=frequency,
        rows_since_fired=jnp.where(firing > 0, 0, silent),
        threshold=threshold,
        steps=stats.steps + 1,
    )


def dead_concepts(config: SAEConfig, stats: SAEStats) -> jax.Array:
    """[M] bool: the concepts that have not fired for ``config.dead_after_rows`` training rows."""
    return stats.rows_since_fired >= min(config.dead_after_rows, MAX_ROWS_SINCE_FIRED)


def _running_threshold(
    config: SAEConfig, threshold: jax.Array, activations: jax.Array, axis_name: str | None
) -> jax.Array:
    """Moving average, in float32, of the smallest activation that a training batch kept."""
    smallest = jnp.min(jnp.where(activations > 0, activations, jnp.inf)).astype(jnp.float32)
    if axis_name is not None:
        smallest = jax.lax.pmin(smallest, axis_name)
    moved = config.threshold_decay * threshold + (1 - config.threshold_decay) * smallest
    updated = jnp.where(threshold < 0, smallest, moved)
    return jnp.where(jnp.isfinite(smallest), updated, threshold)
