"""Sparsemax forward against one pass over memory, the sort definition, and what others offer.

    python -m benchmarks.sparsemax
    python -m benchmarks.sparsemax --shapes demo --scale 0.01

``z * 2`` reads and writes every score once into a new array: nothing that returns p can do less. Freed memory is kept
for the next array (:func:`jax_sae.keep_freed_memory`), for all candidates alike. Peers that are not installed
(``pip install -e '.[bench]'``) are named and left out.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import torch_steps
from benchmarks.harness import Table, machine_rates, measure, tabulate
from benchmarks.results import publish
from benchmarks.shapes import SHAPES
from jax_sae import sparsemax, sparsemax_threshold

Candidates = dict[str, Callable[[], Any]]


def example_scores(shape: tuple[int, int], scale: float, dtype: str) -> jax.Array:
    """Normal scores. Scale 0.01 gives the support of a new attention encoder, 0.1 that of a trained one."""
    return (jax.random.normal(jax.random.key(0), shape) * scale).astype(dtype)


def probability_candidates(z: jax.Array) -> Candidates:
    """Everything that returns sparsemax(z)."""
    ours = jax.jit(sparsemax)
    by_sort = jax.jit(functools.partial(sparsemax, implementation="sort"))
    candidates: Candidates = {
        "jax_sae.sparsemax": lambda: ours(z),
        "sort (the definition)": lambda: by_sort(z),
    }
    if z.dtype != jnp.float32:
        return candidates  # the peers sum in the dtype of the scores, which is wrong by far in bfloat16
    by_optax = jax.jit(jax.vmap(lambda row: optax.projections.projection_simplex(row - row.max())))
    candidates["optax projection_simplex"] = lambda: by_optax(z)
    if not torch_steps.missing("entmax", "torch"):
        import entmax
        import torch

        scores = torch.from_numpy(np.array(z))
        candidates["entmax (torch)"] = lambda: entmax.sparsemax(scores, dim=-1)
    return candidates


def verify(candidates: Candidates, z: jax.Array, tolerance: float) -> None:
    """Holds every candidate to the definition in float64.

    Raises:
      AssertionError: one of them is off by more than ``tolerance`` somewhere.
    """
    expected = sort_definition(np.asarray(z, np.float64))
    for name, candidate in candidates.items():
        found = np.asarray(candidate(), np.float64)
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=name)


def sort_definition(z: np.ndarray) -> np.ndarray:
    """Sparsemax of the rows of ``z [rows, concepts]``: Martins and Astudillo 2016, Algorithm 1."""
    descending = -np.sort(-z, axis=-1)
    sums = np.cumsum(descending, axis=-1) - 1
    count = np.sum(descending * np.arange(1, z.shape[-1] + 1) > sums, axis=-1, keepdims=True)
    tau = np.take_along_axis(sums, count - 1, axis=-1) / count
    return np.maximum(z - tau, 0)


def sparsemax_table(name: str, z: jax.Array, *, rounds: int, copy_rate: float) -> Table:
    """Times all candidates on ``z``; the limit is one read of z and, where p is returned, one write."""
    probabilities = probability_candidates(z)
    verify(probabilities, z, tolerance=1e-6 if z.dtype == jnp.float32 else 1e-2)
    double, softmax, threshold = (
        jax.jit(lambda z: z * 2),
        jax.jit(jax.nn.softmax),
        jax.jit(sparsemax_threshold),
    )
    candidates: Candidates = {
        "z * 2": lambda: double(z),
        "softmax": lambda: softmax(z),
        "jax_sae.sparsemax_threshold": lambda: threshold(z),
        **probabilities,
    }
    limits = dict.fromkeys(candidates, 2 * z.nbytes / copy_rate)
    limits["jax_sae.sparsemax_threshold"] = z.nbytes / copy_rate
    support = float(jnp.median(threshold(z)[1]))
    title = f"{name} {z.shape} {z.dtype.name}, support {support:.0f}"
    samples = measure(candidates, rounds=rounds)
    return tabulate(title, samples, baseline="z * 2", limits=limits, items=z.shape[0])


def main(
    shapes: tuple[str, ...] = ("demo", "vision"),
    scale: float = 0.1,
    dtype: Literal["float32", "bfloat16"] = "float32",
    rounds: int = 10,
) -> None:
    """Benchmark sparsemax.

    Args:
      shapes: names of benchmarks.shapes.
      scale: standard deviation of the scores; the support shrinks as it grows.
      dtype: of the scores.
      rounds: timings of each candidate.
    """
    torch_steps.prepare("entmax", "torch")
    rates = machine_rates()
    tables = []
    for name in shapes:
        z = example_scores((SHAPES[name].rows, SHAPES[name].concepts), scale, dtype)
        tables.append(sparsemax_table(name, z, rounds=rounds, copy_rate=rates["copy B/s"]))
    publish("sparsemax", tables, rates=rates)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.sparsemax")
