"""A whole training step (forward, loss, backward, Adam) against PyTorch peers on the same parameters and rows.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --cases topk --shapes text --rounds 5

Ours runs with the capacity that a training run comes to by itself, and densely, as it is defined. For sparsemax the
peers are the paper's equations in PyTorch as the published code computes them (``concepts W_K`` and ``concepts W_V``
made anew in every step, a sort for the threshold), and with the products in the cheaper order. For topk they are the
steps of SAELens' and dictionary_learning's trainers. Peers that are not installed are named and left out.

The first loss of every candidate is held to that of the others. The loss is the published one. The support is that
of a new preset in ``sparsemax`` (about 100 concepts per row of these normal rows) and about 35 in
``sparsemax_small``, where the scores are 3 times as large; the learning rate is too small to move either. No concept
counts as dead.

The limit is one product of the batch with all keys, at the rate that this very product has by itself, and one pass of
Adam over the parameters: 28 bytes per parameter (read parameter, gradient and both moments, write all but the
gradient) at the measured bandwidth of copying. Freed memory is kept (:func:`jax_sae.keep_freed_memory`): it serves
the peers as well, since all run in one process.
"""

import functools
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import torch_steps
from benchmarks.harness import Figures, Table, copy_bandwidth, matmul_rate, measure, tabulate
from benchmarks.results import publish
from benchmarks.shapes import SHAPES, Shape
from jax_sae import (
    SAEConfig,
    TrainState,
    capacity_limit,
    choose_capacity,
    init_train_state,
    jit_train_step,
)

LEARNING_RATE = 1e-6
BATCHES = 4  # different ones, in turn
STEPS_TO_SETTLE = 10  # after which a training run looks what capacity it needs
WARMUP = 4  # the first steps touch memory for the first time
RATE_ROUNDS = 20  # the best of which is the limit
ADAM_BYTES = 28  # per float32 parameter: read p, g, m, v, write p, m, v
TOLERANCE = 1e-4  # of first losses, relative
_PUBLISHED_LOSS = {"loss": "mse_over_norm", "loss_scale": 10.0}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {  # preset and what is changed of it
    "sparsemax": ("sparsemax", _PUBLISHED_LOSS),
    "sparsemax_small": ("sparsemax", _PUBLISHED_LOSS | {"score_scale": 3.0}),
    "topk": ("topk", {"k": 32}),
}
Candidates = dict[str, Callable[[], Any]]
OURS, DENSE = "jax_sae", "jax_sae, dense"


def config_of(case: str, shape: Shape) -> SAEConfig:
    """The autoencoder of a case."""
    preset, changes = CASES[case]
    return SAEConfig.preset(preset, shape.d, shape.concepts, **changes)


def initial_state(config: SAEConfig) -> TrainState:
    """The same parameters at every call."""
    return init_train_state(config, optimizer(), jax.random.key(0))


def optimizer() -> optax.GradientTransformation:
    return optax.adam(LEARNING_RATE)


def batches_of(shape: Shape) -> list[jax.Array]:
    """Normal rows."""
    return list(jax.random.normal(jax.random.key(1), (BATCHES, shape.rows, shape.d)))


def settled_capacity(config: SAEConfig, batches: list[jax.Array]) -> Any:
    """The capacity that a training run on such batches has after its first steps; None where dense is faster."""
    limit, state = capacity_limit(config), initial_state(config)
    first = choose_capacity(config, state.stats, limit)
    if first is None:
        return None
    step = jit_train_step(config, optimizer(), capacity=first)
    for batch in itertools.islice(itertools.cycle(batches), STEPS_TO_SETTLE):
        state, _ = step(state, batch)
    return choose_capacity(config, state.stats, limit)


def places(capacity: Any) -> str:
    """How a table says a capacity: its numbers, or that the step is the dense one."""
    return "dense" if capacity is None else " / ".join(map(str, np.atleast_1d(capacity)))


def compile_step(config: SAEConfig, capacity: Any, state: TrainState, batch: jax.Array) -> tuple[Any, dict[str, float]]:
    """The compiled step, the seconds that took, and the megabytes that XLA has allotted to a call."""
    step: Any = jit_train_step(config, optimizer(), capacity=capacity)
    began = time.perf_counter()
    lowered = step.lower(state, batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    seconds = {"trace s": traced - began, "compile s": time.perf_counter() - traced}
    return compiled, seconds | memory_of(compiled.memory_analysis())


def memory_of(analysis: Any) -> dict[str, float]:
    """Megabytes of a compiled call; what it holds at once counts a donated argument and its output once."""
    sizes = {name: getattr(analysis, f"{name}_size_in_bytes") / 1e6 for name in ("argument", "output", "temp", "alias")}
    at_once = sizes["argument"] + sizes["output"] + sizes["temp"] - sizes["alias"]
    return {"arguments MB": sizes["argument"], "temporaries MB": sizes["temp"], "at once MB": at_once}


def stepping(
    step: Callable[..., Any], state: TrainState, batches: list[jax.Array], seen: list[dict[str, Any]] | None = None
) -> Callable[[], Any]:
    """Goes a step further with every call and returns its loss, once the new state is there; ``seen`` gets metrics."""
    turns = itertools.cycle(batches)

    def go() -> jax.Array:
        nonlocal state
        state, metrics = step(state, next(turns))
        jax.block_until_ready(state)
        if seen is not None:
            seen.append(metrics)
        return metrics["loss"]

    return go


def our_candidates(
    config: SAEConfig, batches: list[jax.Array], seen: list[dict[str, Any]]
) -> tuple[Candidates, list[dict[str, Any]]]:
    """Our step with the capacity of a training run and without any, and what compiling them took.

    ``seen`` gets the metrics of every step of the first.
    """
    capacity = settled_capacity(config, batches)
    candidates: Candidates = {}
    compilations = []
    for name, chosen in {OURS: capacity, DENSE: None}.items():
        state = initial_state(config)
        step, figures = compile_step(config, chosen, state, batches[0])
        candidates[name] = stepping(step, state, batches, seen if name == OURS else None)
        compilations.append({"step": name, "places": places(chosen)} | figures)
    return candidates, compilations


def peer_candidates(config: SAEConfig, batches: list[jax.Array]) -> Candidates:
    """Steps in PyTorch that start from the same parameters, as far as their packages are installed."""
    if torch_steps.missing("torch"):
        return {}
    import torch

    rows = [torch.tensor(np.asarray(batch), device=torch_steps.torch_device()) for batch in batches]
    builders = paper_builders(config) if config.encoder == "attention" else topk_builders(config, len(rows[0]))
    return {name: in_turn(build(parameters_of(config)), rows) for name, build in builders.items()}


def in_turn(step: torch_steps.TorchStep, rows: list[Any]) -> Callable[[], float]:
    """Goes one step further with every call."""
    turns = itertools.cycle(rows)
    return lambda: step(next(turns))


def parameters_of(config: SAEConfig) -> dict[str, np.ndarray]:
    """The initial parameters; ``W_K`` with the scale of the scores in it."""
    model = initial_state(config).model
    names = ("concepts", "W_K", "W_V") if config.encoder == "attention" else ("W_enc", "b_enc", "W_dec", "b_dec")
    arrays = {name: np.array(getattr(model, name)[...]) for name in names}
    if "W_K" in arrays:
        arrays["W_K"] *= config.score_scale
    return arrays


def paper_builders(config: SAEConfig) -> dict[str, Callable[..., torch_steps.TorchStep]]:
    build = functools.partial(torch_steps.paper_step, learning_rate=LEARNING_RATE)
    return {
        "the paper's equations (torch)": build,
        "the same, cheaper order (torch)": functools.partial(build, materialise=False),
    }


def topk_builders(config: SAEConfig, rows: int) -> dict[str, Callable[..., torch_steps.TorchStep]]:
    builders: dict[str, Callable[..., torch_steps.TorchStep]] = {}
    if not torch_steps.missing("sae_lens"):
        build = functools.partial(torch_steps.saelens_step, config, learning_rate=LEARNING_RATE, rows=rows)
        builders |= {"SAELens": build, "SAELens, sparse activations": functools.partial(build, sparse=True)}
    if not torch_steps.missing("dictionary_learning"):
        builders["dictionary_learning"] = functools.partial(
            torch_steps.dictionary_learning_step, config, learning_rate=LEARNING_RATE
        )
    return builders


def verify(candidates: Mapping[str, Callable[[], Any]]) -> None:
    """Takes the first step of every candidate.

    Raises:
      AssertionError: two of them have different losses.
    """
    losses = {name: float(candidate()) for name, candidate in candidates.items()}
    expected = losses[DENSE]
    for name, loss in losses.items():
        np.testing.assert_allclose(loss, expected, rtol=TOLERANCE, err_msg=f"{name}: {losses}")


def limit_seconds(shape: Shape, parameters: int, *, matmul: float, copy: float) -> float:
    """Least seconds of a step: the scores at ``matmul`` FLOP/s and Adam's pass at ``copy`` B/s."""
    return 2 * shape.rows * shape.d * shape.concepts / matmul + ADAM_BYTES * parameters / copy


def parameter_count(config: SAEConfig) -> int:
    shapes = jax.eval_shape(lambda: initial_state(config).model)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def support_of(config: SAEConfig, batch: jax.Array) -> float:
    """Mean number of active concepts per row at initialisation."""
    state = initial_state(config)
    return float(jnp.mean(jnp.sum(state.model(batch, state.stats).activations != 0, axis=-1)))


def step_table(
    case: str, name: str, shape: Shape, *, rounds: int, peers: bool, rates: Mapping[str, float]
) -> tuple[Table, list[dict[str, Any]]]:
    """Times all candidates of a case at a shape; also what compiling ours took."""
    config, batches = config_of(case, shape), batches_of(shape)
    support = support_of(config, batches[0])
    title = f"{case} {name}, B = {shape.rows}, d = {shape.d}, M = {shape.concepts:,}, support {support:.0f}"
    seen: list[dict[str, Any]] = []
    candidates, compilations = our_candidates(config, batches, seen)
    if peers:
        candidates |= peer_candidates(config, batches)
    verify(candidates)
    limit = limit_seconds(shape, parameter_count(config), matmul=rates[matmul_name(shape)], copy=rates["copy B/s"])
    samples = measure(candidates, rounds=rounds, warmup=WARMUP)
    dense = sum(float(metrics.get("dense", 0.0)) for metrics in seen)
    if dense:
        print(f"{title}: {dense:.0f} of {len(seen)} sparse steps did not fit and were computed densely")
    table = tabulate(title, samples, baseline=OURS, limits=dict.fromkeys(samples, limit), items=shape.rows)
    return table, [{"case": f"{case} {name}"} | figures for figures in compilations]


def matmul_name(shape: Shape) -> str:
    return f"matmul [{shape.rows}, {shape.d}] @ [{shape.d}, {shape.concepts}] FLOP/s"


def rates_at(shapes: list[Shape]) -> dict[str, float]:
    """The machine's limits: copying, and the product of a batch with all keys at every shape."""
    rates = {"copy B/s": copy_bandwidth(rounds=RATE_ROUNDS)}
    for shape in shapes:
        rates[matmul_name(shape)] = matmul_rate(shape.rows, shape.d, shape.concepts, rounds=RATE_ROUNDS)
    return rates


def main(
    cases: tuple[str, ...] = tuple(CASES),
    shapes: tuple[str, ...] = ("vision_32", "vision"),
    rounds: int = 10,
    peers: bool = True,
    json: Path | None = None,
) -> None:
    """Benchmark the training step.

    Args:
      cases: names of CASES.
      shapes: names of benchmarks.shapes.
      rounds: timings of each candidate.
      peers: time PyTorch's too.
      json: folder for the JSON in place of benchmarks/results.
    """
    torch_steps.prepare(*("torch", "sae_lens", "dictionary_learning") if peers else ())
    rates = rates_at([SHAPES[name] for name in shapes])
    results = [
        step_table(case, name, SHAPES[name], rounds=rounds, peers=peers, rates=rates)
        for name in shapes
        for case in cases
    ]
    compilations = tuple(row for _, rows in results for row in rows)
    figures = [Figures("Compiling our step, and the memory of a call", compilations)]
    publish("train_step", [table for table, _ in results], figures=figures, rates=rates, root=json)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.train_step")
