"""The loss of a training batch with its gradients: densely, which is the definition, or over few places per row."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jax_sae.ops import Places
from jax_sae.ops.rows import BLOCK, Blocks, plan_blocks
from jax_sae.sae.losses import dead_terms, main_terms, sae_loss
from jax_sae.sae.modules import SAEOutput, SparseAutoencoder
from jax_sae.sae.stats import Capacity, SAEStats, dead_concepts, needs_of, update_stats
from jax_sae.sae.subset import add_gradients, take_concepts, take_stats

_DEAD_SHARES = (32, 4, 1)  # of the dictionary, one in so many: the loss of dead concepts is compiled for so many


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

    A batch that needs more of them, on any device, is computed densely: nothing is cut off. ``stats.needs`` counts what
    was needed.
    """
    places = model.find_places(x, stats, capacity.row, axis_name=axis_name)
    size = min(BLOCK, capacity.row)
    room = -(-len(x) * capacity.mean // size)
    blocks, needed = plan_blocks(places.indices, places.used, room)
    fullest = jnp.max(places.count, initial=0)
    if axis_name is not None:
        fullest, needed = jax.lax.pmax((fullest, needed), axis_name)
    overflow = (fullest > capacity.row) | (needed > room)

    def densely() -> StepGradients:
        return dense_gradients(model, stats, x, step, row_weights=row_weights, axis_name=axis_name)

    def over_places() -> StepGradients:
        at = places, blocks
        return _gradients_at(model, stats, x, step, at, row_weights=row_weights, axis_name=axis_name)

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
    *,
    row_weights: jax.Array | None,
    axis_name: str | None,
) -> StepGradients:
    def loss_at_places(model: SparseAutoencoder) -> tuple[jax.Array, tuple[SAEOutput, dict[str, jax.Array]]]:
        output = model.at_places(x, stats, *places)
        terms = main_terms(model, output, step, row_weights=row_weights, axis_name=axis_name)
        return sum(terms.values(), jnp.float32(0)), (output, terms)

    (loss, (output, terms)), gradients = jax.value_and_grad(loss_at_places, has_aux=True)(model)
    if model.config.aux_k or model.config.pre_activation_coefficient:
        of_dead, gradients = _add_dead_gradients(model, stats, output, gradients, axis_name)
        loss, terms = loss + sum(of_dead.values(), jnp.float32(0)), terms | of_dead
    return _step_gradients(model, stats, output, gradients, loss, terms, axis_name)


def _add_dead_gradients(
    model: SparseAutoencoder,
    stats: SAEStats,
    output: SAEOutput,
    gradients: SparseAutoencoder,
    axis_name: str | None,
) -> tuple[dict[str, jax.Array], SparseAutoencoder]:
    """The terms of the loss of dead concepts, and ``gradients`` with theirs: computed as an autoencoder of their own.

    Nothing is computed while none is dead; else the smallest of a few compiled sizes that they fit in.
    """
    config, dead = model.config, dead_concepts(model.config, stats)
    sizes = sorted({max(config.aux_k, config.n_concepts // share) for share in _DEAD_SHARES})
    residual = jax.lax.stop_gradient(output.normalized - output.y)

    def of_size(size: int, gradients: SparseAutoencoder) -> tuple[dict[str, jax.Array], SparseAutoencoder]:
        indices = jnp.nonzero(dead, size=size, fill_value=config.n_concepts)[0]
        part, part_stats, exists = take_concepts(model, indices), take_stats(stats, indices), indices < len(dead)

        def loss(part: SparseAutoencoder) -> tuple[jax.Array, dict[str, jax.Array]]:
            scores = part.scores(output.normalized, part_stats)
            terms = dead_terms(part, scores, exists, residual, axis_name)
            return sum(terms.values(), jnp.float32(0)), terms

        (_, terms), of_part = jax.value_and_grad(loss, has_aux=True)(part)
        return terms, add_gradients(gradients, of_part, indices)

    sized = [partial(of_size, size) for size in sizes]
    names = jax.eval_shape(sized[0], gradients)[0]
    nothing = lambda gradients: (dict.fromkeys(names, jnp.float32(0)), gradients)  # noqa: E731
    number = jnp.sum(dead, dtype=jnp.int32)
    fits = 1 + jnp.searchsorted(jnp.array(sizes, jnp.int32), number)
    return jax.lax.switch(jnp.where(number == 0, 0, fits), [nothing, *sized], gradients)


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
    """[] mean over rows of the number of nonzero activations [B, n].

    Counted for each column first, as the firing of concepts is: all of it is one pass over the activations then.
    """
    counts = jnp.sum(activations != 0, axis=0, dtype=jnp.int32).astype(jnp.float32)
    return jnp.sum(counts) / activations.shape[0]
