"""Everything a sparse autoencoder keeps that is not a parameter: explicit, and frozen at evaluation."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_sae.sae.config import SAEConfig

MAX_ROWS_SINCE_FIRED = 2**30
CAPACITIES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""The numbers of places that :func:`jax_sae.choose_capacity` chooses from."""


class Capacity(NamedTuple):
    """Places for active concepts in a sparse training step.

    Attributes:
      row: the most that one row can have.
      mean: what a row has on average over the batch of a device, counted in blocks of 32.
    """

    row: int
    mean: int


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
      capacity: [2] int32, the :class:`Capacity` of the last training step; 0 if it was dense.
      needs: [2, len(CAPACITIES) + 1] int32, of the sparse training steps since they were last looked at, how many
        needed which of ``CAPACITIES`` for their fullest row and on average; the last entry for more than the largest.
    """

    mean: jax.Array
    scale: jax.Array
    frequency: jax.Array
    rows_since_fired: jax.Array
    threshold: jax.Array
    steps: jax.Array
    k: jax.Array
    capacity: jax.Array
    needs: jax.Array


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
        capacity=jnp.zeros(2, jnp.int32),
        needs=jnp.zeros((2, len(CAPACITIES) + 1), jnp.int32),
    )


def update_stats(
    config: SAEConfig,
    stats: SAEStats,
    activations: jax.Array,
    *,
    indices: jax.Array | None = None,
    axis_name: str | None = None,
) -> SAEStats:
    """The statistics after one training batch.

    Args:
      config: the autoencoder.
      stats: the statistics before the batch.
      activations: [B, M] activations of the batch; of this device's part of it when ``axis_name`` is given.
      indices: None, or for activations [B, K] over places the concept of each, M in unused places.
      axis_name: the mapped axis that the batch is split over.
    """
    rows = jnp.int32(activations.shape[0])
    if indices is None:
        firing = jnp.sum(activations > 0, axis=0, dtype=jnp.int32)
    else:
        firing = jnp.zeros(config.n_concepts, jnp.int32)
        firing = firing.at[indices].add((activations > 0).astype(jnp.int32), mode="drop")
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


def needs_of(fullest: jax.Array, mean: jax.Array) -> jax.Array:
    """``SAEStats.needs`` of one step, whose fullest row needs ``fullest`` places and whose average is ``mean``."""
    needed = jnp.stack([fullest, mean]).astype(jnp.int32)
    smallest = jnp.searchsorted(jnp.array(CAPACITIES, jnp.int32), needed)
    return (jnp.arange(len(CAPACITIES) + 1)[None, :] == smallest[:, None]).astype(jnp.int32)


def forget_needs(stats: SAEStats) -> SAEStats:
    """``stats`` with nothing in ``needs``: to be done after they were looked at."""
    return dataclasses.replace(stats, needs=jnp.zeros_like(stats.needs))


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
