"""The loss of a training batch with its gradients: densely, which is the definition, or over few places per row."""

import dataclasses

import jax
import jax.numpy as jnp

from jax_sae.ops import Places
from jax_sae.ops.rows import BLOCK, Blocks, plan_blocks
from jax_sae.sae.losses import dead_terms, main_terms, sae_loss
from jax_sae.sae.modules import SAEOutput, SparseAutoencoder
from jax_sae.sae.stats import Capacity, SAEStats, dead_concepts, needs_of, update_stats
from jax_sae.sae.subset import add_gradients, take_concepts, take_stats

_DEAD_SHARE = 8  # of the dictionary, one in this many: more dead concepts than that are handled densely


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepGradients:
    """What the optimizer and the log need of a batch.

    Attributes:
      gradients: of the loss; the shape of the model.
      stats: the statistics after the batch.
      loss: [].
      terms: of the loss, [] each.
      x_hat: [B, d_in] reconstruction.
      active: [] mean number of active concepts.
      dense: [] bool, whether the batch was computed densely.
    """

    gradients: SparseAutoencoder
    stats: SAEStats
    loss: jax.Array
    terms: dict[str, jax.Array]
    x_hat: jax.Array
    active: jax.Array
    dense: jax.Array


def dense_gradients(
    model: SparseAutoencoder,
    stats: SAEStats,
    x: jax.Array,
    step: jax.Array,
    *,
    row_weights: jax.Array | None = None,
    axis_name: str | None = None,
) -> StepGradients:
    """The definition: :func:`jax_sae.sae_loss` differentiated, every concept of every row computed."""
    loss_and_gradients = jax.value_and_grad(sae_loss, has_aux=True)
    (loss, (output, terms)), gradients = loss_and_gradients(
        model, stats, x, step, row_weights=row_weights, axis_name=axis_name
    )
    return _step_gradients(model, stats, output, gradients, loss, terms, axis_name)


def sparse_gradients(
    model: SparseAutoencoder,
    stats: SAEStats,
    x: jax.Array,
    step: jax.Array,
    *,
    capacity: Capacity,
    row_weights: jax.Array | None = None,
    axis_name: str | None = None,
) -> StepGradients:
    """:func:`dense_gradients` with one dense matrix product and the rest over the places of ``capacity``.

    A batch that needs more of them, on any device, or that has more dead concepts than an eighth of the dictionary
    while these have a loss, is computed densely: nothing is cut off. ``stats.needs`` counts what was needed.
    """
    places = model.find_places(x, stats, capacity.row, axis_name=axis_name)
    size = min(BLOCK, capacity.row)
    room = -(-len(x) * capacity.mean // size)
    blocks, needed = plan_blocks(places.indices, places.used, room)
    fullest = jnp.max(places.count, initial=0)
    if axis_name is not None:
        fullest, needed = jax.lax.pmax((fullest, needed), axis_name)
    dead = _dead_places(model, stats)
    overflow = (fullest > capacity.row) | (needed > room)
    if dead is not None:
        overflow |= dead[1] > dead[0].shape[0]

    def densely() -> StepGradients:
        return dense_gradients(model, stats, x, step, row_weights=row_weights, axis_name=axis_name)

    def over_places() -> StepGradients:
        dead_indices = None if dead is None else dead[0]
        return _gradients_at(
            model, stats, x, step, (places, blocks), dead_indices, row_weights=row_weights, axis_name=axis_name
        )

    found = jax.lax.cond(overflow, densely, over_places)
    mean = -(-needed * size // max(len(x), 1))
    seen = dataclasses.replace(
        found.stats, capacity=jnp.array(capacity, jnp.int32), needs=stats.needs + needs_of(fullest, mean)
    )
    return dataclasses.replace(found, stats=seen)


def _gradients_at(
    model: SparseAutoencoder,
    stats: SAEStats,
    x: jax.Array,
    step: jax.Array,
    places: tuple[Places, Blocks],
    dead: jax.Array | None,
    *,
    row_weights: jax.Array | None,
    axis_name: str | None,
) -> StepGradients:
    def loss_at_places(model: SparseAutoencoder) -> tuple[jax.Array, tuple[SAEOutput, dict[str, jax.Array]]]:
        output = model.at_places(x, stats, *places, axis_name=axis_name)
        terms = main_terms(model, output, step, row_weights=row_weights, axis_name=axis_name)
        return sum(terms.values(), jnp.float32(0)), (output, terms)

    (loss, (output, terms)), gradients = jax.value_and_grad(loss_at_places, has_aux=True)(model)
    if dead is not None:
        of_dead, part = _dead_gradients(model, stats, output, dead, axis_name)
        gradients = add_gradients(gradients, part, dead)
        loss, terms = loss + sum(of_dead.values(), jnp.float32(0)), terms | of_dead
    return _step_gradients(model, stats, output, gradients, loss, terms, axis_name)


def _dead_places(model: SparseAutoencoder, stats: SAEStats) -> tuple[jax.Array, jax.Array] | None:
    """(indices [n] of dead concepts, M in unused places; [] how many are dead), or None where they have no loss."""
    config = model.config
    if not (config.aux_k or config.pre_activation_coefficient):
        return None
    dead = dead_concepts(config, stats)
    places = max(config.aux_k, config.n_concepts // _DEAD_SHARE, 1)
    indices = jnp.nonzero(dead, size=places, fill_value=config.n_concepts)[0]
    return indices.astype(jnp.int32), jnp.sum(dead, dtype=jnp.int32)


def _dead_gradients(
    model: SparseAutoencoder, stats: SAEStats, output: SAEOutput, dead: jax.Array, axis_name: str | None
) -> tuple[dict[str, jax.Array], SparseAutoencoder]:
    """The terms of the loss of dead concepts, and their gradients as those of :func:`take_concepts`; 0 without any."""
    part, part_stats, exists = take_concepts(model, dead), take_stats(stats, dead), dead < model.config.n_concepts
    residual = jax.lax.stop_gradient(output.normalized - output.y)

    def loss(part: SparseAutoencoder) -> tuple[jax.Array, dict[str, jax.Array]]:
        scores = part.scores(output.normalized, part_stats)
        terms = dead_terms(part, scores, exists, residual, axis_name)
        return sum(terms.values(), jnp.float32(0)), terms

    def nothing(part: SparseAutoencoder) -> tuple[tuple[jax.Array, dict[str, jax.Array]], SparseAutoencoder]:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(with_gradient, part))

    with_gradient = jax.value_and_grad(loss, has_aux=True)
    (_, terms), gradients = jax.lax.cond(jnp.any(exists), with_gradient, nothing, part)
    return terms, gradients


def _step_gradients(
    model: SparseAutoencoder,
    stats: SAEStats,
    output: SAEOutput,
    gradients: SparseAutoencoder,
    loss: jax.Array,
    terms: dict[str, jax.Array],
    axis_name: str | None,
) -> StepGradients:
    after = update_stats(model.config, stats, output.activations, indices=output.indices, axis_name=axis_name)
    active = mean_active(output.activations)
    return StepGradients(gradients, after, loss, terms, output.x_hat, active, dense=jnp.bool_(output.indices is None))


def mean_active(activations: jax.Array) -> jax.Array:
    """[] mean over rows of the number of nonzero activations [B, ...]."""
    return jnp.mean(jnp.sum(activations != 0, axis=-1), dtype=jnp.float32)
