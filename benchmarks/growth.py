"""How the cost of sparsemax and of the training step grows with concepts, rows and support.

    python -m benchmarks.growth
    python -m benchmarks.growth --only "step over rows" --seconds 60 --memory-gb 40

Every sweep changes one size and keeps the others. A candidate is left out of a point, and of those after it, when
its last time, scaled by the size, says that the point would take longer than ``--seconds`` in all, or when the arrays
of the point would be larger than ``--memory-gb``; what was left out is printed and in the JSON. Beside the JSON lies
a picture with logarithmic axes. Freed memory is kept (:func:`jax_sae.keep_freed_memory`).
"""

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import torch_steps
from benchmarks.harness import Figures, Samples, Table, measure, tabulate
from benchmarks.results import publish
from benchmarks.shapes import Shape
from benchmarks.sparsemax import example_scores, probability_candidates
from benchmarks.train_step import (
    DENSE,
    OURS,
    batches_of,
    initial_state,
    optimizer,
    parameter_count,
    settled_capacity,
    stepping,
)
from jax_sae import SAEConfig, jit_train_step, sparsemax_threshold

CONCEPTS = (*(3072 * 2**i for i in range(9)), 1_048_576)
ROWS = tuple(32 * 2**i for i in range(10))
NARROW, WIDE = 12_288, 49_152  # the concepts of the other sweeps
SUPPORTS = (10, 30, 100, 300, 1000, 3000)
TRAINED_SCALE = 0.1  # standard deviation of a trained encoder's scores
WARMUP = 4  # the first steps touch memory for the first time
Candidates = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Point:
    """One place of a sweep.

    ``work`` is what time is taken to be proportional to, ``gigabytes`` what the arrays need, ``candidates`` makes
    those of the given names.
    """

    value: int
    work: float
    gigabytes: float
    candidates: Callable[[Iterable[str]], Candidates]


@dataclass(frozen=True)
class Sweep:
    """What is measured, along which size, at which points, and who takes part."""

    name: str
    axis: str
    fixed: str
    names: tuple[str, ...]
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Curve:
    """The seconds of every point of a sweep, by candidate, and who was left out where and why."""

    sweep: Sweep
    samples: Mapping[int, Samples]
    skipped: tuple[dict[str, str | float], ...]


def measure_sweep(sweep: Sweep, *, rounds: int, seconds: float, gigabytes: float) -> Curve:
    """Measures what fits into ``seconds`` per point and candidate and into ``gigabytes``; prints what does not."""
    last: dict[str, tuple[float, float]] = {}  # of every candidate the seconds and the work of its last point
    samples: dict[int, Samples] = {}
    skipped: list[dict[str, str | float]] = []
    for point in sweep.points:
        taking_part = []
        for name in sweep.names:
            time, work = last.get(name, (0.0, point.work))
            predicted = time * point.work / work * (rounds + WARMUP)
            if predicted <= seconds and point.gigabytes <= gigabytes:
                taking_part.append(name)
                continue
            size = f"{sweep.axis} = {point.value:,}"
            print(f"skipped: {sweep.name}, {name}, {size}: {predicted:.1f} s, {point.gigabytes:.1f} GB", flush=True)
            of_point = {"sweep": sweep.name, "candidate": name, "size": size}
            skipped.append({**of_point, "predicted s": predicted, "arrays GB": point.gigabytes})
        if taking_part:
            samples[point.value] = measure(point.candidates(taking_part), rounds=rounds, warmup=WARMUP)
            last |= {name: (float(np.median(t)), point.work) for name, t in samples[point.value].items()}
    return Curve(sweep, samples, tuple(skipped))


def sparsemax_point(value: int, shape: Shape, scale: float, work: float) -> Point:
    """All that :mod:`benchmarks.sparsemax` compares, on normal scores of standard deviation ``scale``."""

    def candidates(names: Iterable[str]) -> Candidates:
        every = probability_candidates(example_scores((shape.rows, shape.concepts), scale, "float32"))
        return {name: every[name] for name in names}

    scores = 4e-9 * shape.rows * shape.concepts
    return Point(value, work, 6 * scores, candidates)  # the sort holds its sorted scores, sums and masks besides


def sparsemax_names() -> tuple[str, ...]:
    """Who takes part in the sweeps of sparsemax here."""
    return tuple(probability_candidates(jnp.zeros((1, 8))))


def step_point(value: int, shape: Shape, scale: float, work: float) -> Point:
    """Our step with the capacity of a training run, and densely. Both take turns on one state, to save memory."""
    config = step_config(shape, scale)

    def candidates(names: Iterable[str]) -> Candidates:
        batches = batches_of(shape)
        capacities = {OURS: settled_capacity(config, batches) if OURS in names else None, DENSE: None}
        steps = {name: jit_train_step(config, optimizer(), capacity=capacities[name]) for name in names}
        return shared_stepping(steps, initial_state(config), batches)

    held = 4e-9 * (6 * parameter_count(config) + 4 * shape.rows * shape.concepts)
    return Point(value, work, held, candidates)


def step_config(shape: Shape, scale: float) -> SAEConfig:
    """The autoencoder whose scores have standard deviation ``scale`` at the start: of unit rows and unit concepts."""
    return SAEConfig.preset("sparsemax", shape.d, shape.concepts, score_scale=scale * shape.d**0.5)


def shared_stepping(steps: Mapping[str, Any], state: Any, batches: list[jax.Array]) -> Candidates:
    """:func:`benchmarks.train_step.stepping` for several steps that hand one state on."""
    chosen = [""]

    def whichever(state: Any, batch: jax.Array) -> Any:
        return steps[chosen[0]](state, batch)

    go = stepping(whichever, state, batches)

    def candidate(name: str) -> Any:
        chosen[0] = name
        return go()

    return {name: functools.partial(candidate, name) for name in steps}


def scale_for(support: int, concepts: int) -> float:
    """Standard deviation of normal scores [8, concepts] with about this median support."""
    scores, support_of = example_scores((8, concepts), 1.0, "float32"), jax.jit(lambda z: sparsemax_threshold(z)[1])
    low, high = 1e-4, 10.0
    for _ in range(20):
        middle = (low * high) ** 0.5
        found = float(jnp.median(support_of(scores * middle)))
        low, high = (middle, high) if found > support else (low, middle)
    return middle


def sweeps(d: int) -> Iterator[Sweep]:
    """All of them."""
    scales = {support: scale_for(support, WIDE) for support in SUPPORTS}
    for kind, names, point in (("sparsemax", sparsemax_names(), sparsemax_point), ("step", (OURS, DENSE), step_point)):
        over_concepts = tuple(point(m, Shape(32, d, m), TRAINED_SCALE, m) for m in CONCEPTS)
        over_rows = tuple(point(b, Shape(b, d, NARROW), TRAINED_SCALE, b) for b in ROWS)
        over_support = tuple(point(s, Shape(256, d, WIDE), scale, 1) for s, scale in scales.items())
        yield Sweep(f"{kind} over concepts", "M", "B = 32", names, over_concepts)
        yield Sweep(f"{kind} over rows", "B", f"M = {NARROW:,}", names, over_rows)
        yield Sweep(f"{kind} over support", "support", f"B = 256, M = {WIDE:,}", names, over_support)


def table_of(curve: Curve) -> Table:
    """A row for every candidate at every point."""
    samples = {
        f"{name}, {curve.sweep.axis} = {value:,}": seconds
        for name in curve.sweep.names
        for value, of_point in curve.samples.items()
        for candidate, seconds in of_point.items()
        if candidate == name
    }
    return tabulate(f"{curve.sweep.name}, {curve.sweep.fixed}", samples)


def draw(curves: list[Curve], path: Path) -> None:
    """Medians over sizes, both axes logarithmic, one panel a sweep."""
    importlib.import_module("matplotlib").use("agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(-(-len(curves) // 3), min(3, len(curves)), figsize=(15, 9), squeeze=False)
    for panel, curve in zip(axes.flat, curves, strict=False):
        for name in curve.sweep.names:
            line = {x: float(np.median(found[name])) for x, found in curve.samples.items() if name in found}
            panel.loglog(list(line), list(line.values()), marker="o", markersize=3, label=name)
        panel.set(title=f"{curve.sweep.name}, {curve.sweep.fixed}", xlabel=curve.sweep.axis, ylabel="seconds a call")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    for panel in list(axes.flat)[len(curves) :]:
        panel.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(
    only: tuple[str, ...] = (),
    d: int = 768,
    rounds: int = 5,
    seconds: float = 20.0,
    memory_gb: float = 10.0,
    json: Path | None = None,
) -> None:
    """Benchmark how cost grows.

    Args:
      only: names of sweeps; all without it.
      d: width of a row.
      rounds: timings of each candidate at each point.
      seconds: what a candidate may take at a point, with its warm-up but without compiling and without the steps that
        find its capacity.
      memory_gb: what the arrays of a point may take.
      json: folder for the JSON and the picture in place of benchmarks/results.
    """
    torch_steps.prepare("entmax", "torch", "matplotlib")
    chosen = [sweep for sweep in sweeps(d) if not only or sweep.name in only]
    curves = [measure_sweep(sweep, rounds=rounds, seconds=seconds, gigabytes=memory_gb) for sweep in chosen]
    skipped = tuple(row for curve in curves for row in curve.skipped)
    figures = [Figures("Left out", skipped)] if skipped else []
    path = publish("growth", [table_of(curve) for curve in curves], figures=figures, root=json)
    if not torch_steps.missing("matplotlib"):
        draw(curves, path.with_suffix(".svg"))
        print(f"drawn: {path.with_suffix('.svg')}")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.growth")
