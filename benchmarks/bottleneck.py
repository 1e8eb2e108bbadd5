"""Gradients over places against the dense definition, as the support grows: where the sparse step stops to pay.

    python -m benchmarks.bottleneck
    python -m benchmarks.bottleneck --shapes demo --supports 10 100 1000

Each preset's loss and gradients, without an optimizer, on normal rows. The support is set by the scale of the scores of
new parameters, the capacity is the smallest that holds every row. Both candidates are held to each other first. The
share of the dictionary at which they cost the same is what :func:`jax_sae.capacity_limit` goes by.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks.harness import Figures, Table, matmul_rate, measure, tabulate
from benchmarks.results import publish
from benchmarks.shapes import SHAPES, Shape
from jax_sae import Capacity, Preset, SAEConfig, TrainState, init_train_state, keep_freed_memory
from jax_sae.ops.rows import BLOCK
from jax_sae.sae.gradients import StepGradients, dense_gradients, sparse_gradients
from jax_sae.sae.stats import CAPACITIES

PRESETS: tuple[Preset, ...] = ("sparsemax", "mlp_sparsemax")
TOLERANCE = 1e-3  # of the gradients' norms, relative: supports of thousands differ by a concept at the threshold


def state_with(preset: Preset, shape: Shape, scale: float) -> TrainState:
    """New parameters whose scores have this scale."""
    config = SAEConfig.preset(preset, shape.d, shape.concepts, score_scale=scale, frequency_cap=None)
    return init_train_state(config, optax.sgd(0.0), jax.random.key(0))


def scale_for(preset: Preset, shape: Shape, rows: jax.Array, support: float) -> float:
    """The scale of the scores, to a few percent, that keeps so many concepts of a row active."""
    low, high = 1e-3, 1e3
    for _ in range(12):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if mean_support(state_with(preset, shape, middle), rows) > support else (low, middle)
    return (low * high) ** 0.5


def mean_support(state: TrainState, rows: jax.Array) -> float:
    return float(_mean_support(state, rows))


@jax.jit
def _mean_support(state: TrainState, rows: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum(state.model(rows, state.stats).activations != 0, axis=-1))


def capacity_for(state: TrainState, rows: jax.Array) -> Capacity | None:
    """The smallest capacity that the rows fit in; None where none of them does."""
    places = jax.jit(lambda state: state.model.find_places(rows, state.stats, CAPACITIES[-1]))(state)
    fullest, blocks = int(places.count.max()), int(jnp.sum(-(-places.used // BLOCK)))
    row = [capacity for capacity in CAPACITIES if capacity >= max(fullest, BLOCK)]
    mean = [capacity for capacity in CAPACITIES if capacity * len(rows) >= blocks * BLOCK]
    return Capacity(row[0], mean[0]) if row and mean else None


def verify(dense: StepGradients, sparse: StepGradients) -> None:
    """Raises AssertionError where gradients or the loss differ, or the sparse ones were computed densely."""
    assert not sparse.dense, "the batch did not fit into its places"
    np.testing.assert_allclose(sparse.loss, dense.loss, rtol=TOLERANCE)
    for a, b in zip(jax.tree.leaves(sparse.gradients), jax.tree.leaves(dense.gradients), strict=True):
        assert jnp.linalg.norm(a - b) <= TOLERANCE * (1e-6 + jnp.linalg.norm(b))


def bottleneck_table(
    preset: Preset, name: str, shape: Shape, support: float, *, rounds: int, product: float
) -> tuple[Table, dict[str, str | float]] | None:
    """Times both at one support; ``product`` is the seconds of the scores' matrix product, the limit of both."""
    rows = jax.random.normal(jax.random.key(1), (shape.rows, shape.d))
    state = state_with(preset, shape, scale_for(preset, shape, rows[:64], support))
    capacity, found = capacity_for(state, rows), mean_support(state, rows)
    if capacity is None:
        print(f"{preset} {name}: a support of {support:.0f} has rows beyond {CAPACITIES[-1]} places: left out")
        return None
    call = state.model, state.stats, rows, jnp.int32(0)
    functions: dict[str, Any] = {
        "dense": jax.jit(dense_gradients),
        "sparse": jax.jit(functools.partial(sparse_gradients, capacity=capacity)),
    }
    verify(*(function(*call) for function in functions.values()))
    candidates = {key: functools.partial(function, *call) for key, function in functions.items()}
    samples = measure(candidates, rounds=rounds)
    places = f"{capacity.row} / {capacity.mean}"
    table = tabulate(
        f"{preset} {name} {shape.rows} x {shape.d} x {shape.concepts}, support {found:.0f}, places {places}",
        samples,
        baseline="dense",
        limits=dict.fromkeys(samples, product),
        items=shape.rows,
    )
    return table, {
        "case": f"{preset} {name}",
        "support": found,
        "places": places,
        "mean places of the concepts %": 100 * capacity.mean / shape.concepts,
        "dense / sparse": 1 / table["sparse"].ratio if table["sparse"].ratio else 0.0,
    }


def main(
    presets: tuple[Preset, ...] = PRESETS,
    shapes: tuple[str, ...] = ("demo", "vision"),
    supports: tuple[float, ...] = (10, 30, 100, 300, 1000),
    rounds: int = 5,
    json: Path | None = None,
) -> None:
    """Benchmark the gradients of a batch.

    Args:
      presets: with sparsemax, by whose scale the support can be set.
      shapes: names of benchmarks.shapes.
      supports: mean numbers of active concepts per row.
      rounds: timings of each candidate.
      json: folder for the JSON in place of benchmarks/results.
    """
    keep_freed_memory()
    tables, summary = [], []
    for name in shapes:
        shape = SHAPES[name]
        flops = 2 * shape.rows * shape.d * shape.concepts
        product = flops / matmul_rate(shape.rows, shape.d, shape.concepts)
        for preset in presets:
            for support in supports:
                if support > shape.concepts / 4:
                    print(f"{preset} {name}: a support of {support:.0f} of {shape.concepts} concepts: left out")
                    continue
                found = bottleneck_table(preset, name, shape, support, rounds=rounds, product=product)
                if found:
                    tables.append(found[0])
                    summary.append(found[1])
    publish("bottleneck", tables, figures=[Figures("where sparse gradients pay", tuple(summary))], root=json)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.bottleneck")
