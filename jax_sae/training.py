"""Training state, the pure step, and the same step under jit, pmap or a mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_sae.ops import reduce_apart
from jax_sae.sae import (
    SAEConfig,
    SAEStats,
    SparseAutoencoder,
    dead_concepts,
    init_stats,
    sae_loss,
)
from jax_sae.sae.gradients import dense_gradients, mean_active, sparse_gradients
from jax_sae.sae.stats import Capacity
from jax_sae.sae.subset import CONCEPT_PARAMETERS

Metrics = dict[str, jax.Array]
Step = Callable[["TrainState", jax.Array], tuple["TrainState", Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes. A pytree: checkpoint it, donate it, shard it.

    Attributes:
      step: [] int32, training steps done.
      model: the parameters.
      opt_state: of the optimizer.
      stats: see :class:`jax_sae.SAEStats`.
    """

    step: jax.Array
    model: SparseAutoencoder
    opt_state: optax.OptState
    stats: SAEStats


def make_optimizer(
    learning_rate: float | jax.Array,
    *,
    total_steps: int,
    warmup_steps: int = 200,
    decay_fraction: float = 0.2,
    b1: float = 0.9,
    b2: float = 0.999,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Adam with the learning rate of :func:`learning_rate_schedule` and optional clipping.

    Args:
      learning_rate: the peak; [] float32, traced, inside :func:`jax_sae.sweep_train_step`.
      total_steps: length of the run.
      warmup_steps: steps of linear warm-up.
      decay_fraction: the last part of the run, over which the rate falls linearly to 0; 0 keeps it constant.
      b1: decay of the first moment.
      b2: decay of the second moment.
      clip_norm: clip the global norm of the gradient to this; None for no clipping.
    """
    schedule = learning_rate_schedule(
        learning_rate, total_steps=total_steps, warmup_steps=warmup_steps, decay_fraction=decay_fraction
    )
    adam = optax.adam(schedule, b1=b1, b2=b2)
    return adam if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), adam)


def learning_rate_schedule(
    learning_rate: float | jax.Array, *, total_steps: int, warmup_steps: int, decay_fraction: float
) -> optax.Schedule:
    """Linear warm-up to ``learning_rate``, constant, then linear decay to 0 over the last steps.

    The first step already moves: step t of the warm-up has the rate ``learning_rate * (t + 1) / warmup_steps``.
    """
    decay_steps = max(1, round(total_steps * decay_fraction))

    def schedule(step: jax.Array) -> jax.Array:
        rise = jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
        fall = jnp.clip((total_steps - step) / decay_steps, 0.0, 1.0) if decay_fraction else 1.0
        return learning_rate * rise * fall

    return schedule


def init_train_state(
    config: SAEConfig, optimizer: optax.GradientTransformation, key: jax.Array, statistics: Any = None
) -> TrainState:
    """A fresh state.

    Args:
      config: the autoencoder.
      optimizer: any optax transformation.
      key: random key of the initial parameters.
      statistics: of the training data (:class:`jax_sae.data.Statistics`): the mean that is subtracted, the
        scale, the start of ``b_dec``. Without it the mean is 0 and the scale 1.
    """
    model = SparseAutoencoder(config, rngs=nnx.Rngs(params=key), statistics=statistics)
    return TrainState(
        step=jnp.int32(0), model=model, opt_state=optimizer.init(model), stats=init_stats(config, statistics)
    )


def train_step(
    config: SAEConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: jax.Array,
    *,
    row_weights: jax.Array | None = None,
    axis_name: str | None = None,
    capacity: Capacity | int | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step: pure, to be jitted, mapped, scanned or sharded.

    Args:
      config: the autoencoder, equal to ``state.model.config``.
      optimizer: what ``state.opt_state`` belongs to.
      state: the state before the step.
      batch: [B, d_in] rows of any float dtype.
      row_weights: [B] factors on their reconstruction errors; see :func:`jax_sae.sae_loss`.
      axis_name: inside ``pmap``, the axis that the batch is split over; ``batch`` is then this device's part,
        and the result equals that of the whole batch on one device.
      capacity: places for concepts that may be active, as many for every row where it is an int: the same numbers, up
        to rounding, from one dense matrix product instead of five or six. A batch that needs more is computed densely,
        which ``dense`` counts. None for the dense definition. See :func:`jax_sae.choose_capacity`.

    Returns:
      (state after the step, scalars float32: ``loss`` and its terms, ``fvu`` per sample, ``l0`` the fraction
      of exact zeros, ``active`` the mean number of active concepts, ``dead_fraction``, ``grad_norm`` of the whole
      gradient, ``dense``, 1 if the batch was computed densely).
    """

    def all_mean(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    if isinstance(capacity, int):
        capacity = Capacity(capacity, capacity)
    gradients_of = dense_gradients if capacity is None else functools.partial(sparse_gradients, capacity=capacity)
    found = gradients_of(state.model, state.stats, batch, state.step, row_weights=row_weights, axis_name=axis_name)
    gradients = all_mean(found.gradients)
    grad_norm = reduce_apart(optax.tree.norm, state.step >= 0, gradients)
    model, opt_state = _update(config, optimizer, state, gradients)
    stats = found.stats if capacity else dataclasses.replace(found.stats, capacity=jnp.zeros(2, jnp.int32))
    metrics = {
        "loss": found.loss,
        **_terms_to_report(found.terms),
        **_forward_metrics(config, found.x_hat, found.active, batch),
    }
    metrics = all_mean(metrics)
    metrics["grad_norm"] = grad_norm
    metrics["dead_fraction"] = jnp.mean(dead_concepts(config, stats), dtype=jnp.float32)
    metrics["dense"] = found.dense.astype(jnp.float32)
    return TrainState(step=state.step + 1, model=model, opt_state=opt_state, stats=stats), metrics


def _forward_metrics(config: SAEConfig, x_hat: jax.Array, active: jax.Array, x: jax.Array) -> Metrics:
    """Scalars of one batch: ``fvu`` (ddof 1), ``l0`` (fraction of zeros), ``active`` (count), means over rows.

    A constant row has no FVU and is left out of its mean.
    """
    x = x.astype(jnp.float32)
    unexplained = jnp.var(x - x_hat, axis=-1, ddof=1)
    variance = jnp.var(x - x[:, :1], axis=-1, ddof=1)  # exactly 0 for a constant row, whatever its value
    varies = variance > 0
    fvu = jnp.where(varies, unexplained / jnp.where(varies, variance, 1.0), 0.0)
    return {
        "fvu": jnp.sum(fvu) / jnp.maximum(jnp.sum(varies), 1),
        "active": active,
        "l0": 1 - active / config.n_concepts,
    }


def eval_step(config: SAEConfig, model: SparseAutoencoder, stats: SAEStats, x: jax.Array) -> Metrics:
    """``loss``, ``fvu``, ``active`` and ``l0`` of ``x [B, d_in]``, as :func:`train_step` has them; changes nothing."""
    loss, (output, _) = sae_loss(model, stats, x, step=config.sparsity_warmup_steps, training=False)
    return {"loss": loss, **_forward_metrics(config, output.x_hat, mean_active(output.activations), x)}


def _terms_to_report(terms: Metrics) -> Metrics:
    """The terms of the loss, where there is more than one."""
    return {f"loss_{name}": value for name, value in terms.items()} if len(terms) > 1 else {}


def _update(
    config: SAEConfig, optimizer: optax.GradientTransformation, state: TrainState, grads: SparseAutoencoder
) -> tuple[SparseAutoencoder, optax.OptState]:
    """The optimizer's update: smaller for projections, and on the sphere of unit decoder rows, where configured."""
    always = state.step >= 0
    if config.unit_norm_decoder:
        rows, grad = state.model.W_dec[...], grads.W_dec[...]
        along = reduce_apart(_dots, always, rows, grad) / reduce_apart(_squared_norms, always, rows)
        grads.W_dec[...] = grad - rows * along
    updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
    for name in ("W_Q", "W_K", "W_V"):
        if hasattr(updates, name):
            getattr(updates, name)[...] *= config.projection_rate
    model = optax.apply_updates(state.model, updates)
    if config.unit_norm_decoder:
        rows = model.W_dec[...]
        model.W_dec[...] = rows / jnp.sqrt(reduce_apart(_squared_norms, always, rows))
    return model, opt_state


def _squared_norms(rows: jax.Array) -> jax.Array:
    """[M, 1], never 0."""
    return jnp.maximum(jnp.sum(rows**2, axis=-1, keepdims=True), jnp.finfo(rows.dtype).tiny)


def _dots(rows: jax.Array, others: jax.Array) -> jax.Array:
    """[M, 1] scalar products of rows."""
    return jnp.sum(rows * others, axis=-1, keepdims=True)


def jit_train_step(
    config: SAEConfig,
    optimizer: optax.GradientTransformation,
    *,
    steps_per_call: int = 1,
    capacity: Capacity | int | None = None,
) -> Step:
    """:func:`train_step` under ``jit``, the state donated.

    Args:
      config: the autoencoder.
      optimizer: any optax transformation.
      steps_per_call: with S > 1 a call takes ``batch [S, B, d_in]``, runs S steps in one ``lax.scan`` and
        gives metrics ``[S]``.
      capacity: see :func:`train_step`.
    """
    step = functools.partial(train_step, config, optimizer, capacity=capacity)
    return jax.jit(_repeat(step, steps_per_call), donate_argnums=0)


def _repeat(step: Step, steps_per_call: int) -> Step:
    if steps_per_call == 1:
        return step
    return lambda state, batches: jax.lax.scan(step, state, batches)


def pmap_train_step(
    config: SAEConfig,
    optimizer: optax.GradientTransformation,
    *,
    steps_per_call: int = 1,
    capacity: Capacity | int | None = None,
    devices: list[jax.Device] | None = None,
) -> Step:
    """:func:`train_step` under ``pmap``: data parallel over the local devices of every host.

    The state goes in and comes out replicated and not stacked; ``batch`` is this host's ``[B, d_in]`` (or
    ``[S, B, d_in]``), which is split evenly over its devices. ``capacity`` is that of :func:`train_step`.

    Raises:
      ValueError: on a call whose B is not a multiple of the number of local devices.
    """
    local = jax.local_devices() if devices is None else devices
    step = functools.partial(train_step, config, optimizer, axis_name="data", capacity=capacity)
    mapped = jax.pmap(
        _repeat(step, steps_per_call),
        axis_name="data",
        in_axes=(None, 0 if steps_per_call == 1 else 1),
        out_axes=(None, None),
        donate_argnums=0,
        devices=devices,
    )

    def split_and_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, Metrics]:
        *lead, rows, width = batch.shape
        if rows % len(local):
            raise ValueError(f"batch has {rows} rows; expected a multiple of the {len(local)} local devices")
        return mapped(state, batch.reshape(*lead, len(local), rows // len(local), width))

    return split_and_step


def mesh_train_step(
    config: SAEConfig, optimizer: optax.GradientTransformation, mesh: Mesh, *, steps_per_call: int = 1
) -> Step:
    """:func:`train_step` over a mesh with axes ``data`` and ``model``.

    The batch is split over ``data``, everything with a concept axis over ``model``; XLA places the collectives, also
    where the axes of ``mesh`` are explicit, as ``jax.make_mesh`` makes them. The step is the dense one.
    Put the state on the mesh with ``jax.device_put(state, state_shardings(state, mesh))``.
    """
    mesh = _automatic(mesh)
    step = _repeat(functools.partial(train_step, config, optimizer), steps_per_call)
    rows = P("data", None) if steps_per_call == 1 else P(None, "data", None)

    @functools.partial(jax.jit, donate_argnums=0)
    def sharded_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, Metrics]:
        batch = jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, rows))
        state, metrics = step(state, batch)
        return jax.lax.with_sharding_constraint(state, state_shardings(state, mesh)), metrics

    def step_on_mesh(state: TrainState, batch: jax.Array) -> tuple[TrainState, Metrics]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # whatever mesh the caller has set
            return sharded_step(state, batch)

    return step_on_mesh


def _automatic(mesh: Mesh) -> Mesh:
    """The mesh with axes along which XLA splits operations by itself."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


# Arrays with one entry for each concept along their first axis; ``threshold`` of the statistics is a scalar.
_OF_CONCEPTS = CONCEPT_PARAMETERS | {"frequency", "rows_since_fired"}


def _names(path: tuple[Any, ...]) -> set[str]:
    """The names of attributes and keys on the way to a leaf."""
    return {str(getattr(key, "key", getattr(key, "name", ""))) for key in path}


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """The sharding of every leaf of ``state`` on ``mesh``: concepts over ``model``, the rest replicated.

    Its axes are automatic, whatever those of ``mesh`` are: XLA splits the step.
    """
    mesh = _automatic(mesh)

    def sharding(path: tuple[Any, ...], leaf: jax.Array) -> NamedSharding:
        if not (_OF_CONCEPTS & _names(path) and leaf.ndim) or "model" not in mesh.axis_names:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, P("model", *(None,) * (leaf.ndim - 1)))

    return jax.tree_util.tree_map_with_path(sharding, state)
