"""What XLA makes of a training step for GPUs: on all concepts, and on a few places of a row.

    JAX_PLATFORMS=cpu python -m benchmarks.compiled_gpu

It needs the plugin for CUDA (the extra ``compiled-cuda``) and no GPU. Nothing is run or timed. The limit is the time of
the matrix products with all concepts at the published rate, plus that of everything else at the bandwidth of memory:
what is read and written, and the rows of the dictionary that places take or add to, none of them found in a cache.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from benchmarks.compiled_parts import MB, PLACES, parts
from benchmarks.gpu_compiler import CHIPS, Chip, Program, compile_for
from benchmarks.harness import Figures
from benchmarks.results import publish
from benchmarks.shapes import Shape
from jax_sae import Capacity, Preset, SAEConfig, init_train_state, make_optimizer, train_step

GIGA, US = 1e9, 1e-6


@dataclass(frozen=True)
class Work:
    """What a program does besides the traffic that is read off it.

    Attributes:
      rounded: products of all rows with all concepts in bfloat16.
      products: the same in float32.
      touched: how often every place has its row of the dictionary read or written.
    """

    rounded: int = 0
    products: int = 0
    touched: int = 0


@dataclass(frozen=True)
class Case:
    """A program and its work."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    work: Work
    donate: tuple[int, ...] = ()


PARTS = {
    "scores": Work(rounded=1),
    "the 32 largest, as a mask": Work(),
    "places of what is above a bound": Work(),
    "decoding": Work(products=1),
    "decoding, at places": Work(touched=1),
    "gradient of the activations": Work(products=1),
    "gradient of the activations, at places": Work(touched=1),
    "gradient of the dictionary": Work(products=1),
    "gradient of the dictionary, at places": Work(touched=2),
}
DENSE_STEP = Work(rounded=1, products=5)
# Decoding, the gradients of activations and queries, and that of the dictionary: of keys and values in one where they
# are the same.
SPARSE_STEP: dict[Preset, Work] = {"sparsemax": Work(rounded=1, touched=5), "topk": Work(rounded=1, touched=7)}


def cases(shape: Shape, presets: tuple[Preset, ...]) -> Iterator[Case]:
    """The parts of a step, and whole steps."""
    for name, function, arguments in parts(shape, PLACES):
        yield Case(name, function, arguments, PARTS[name])
    for preset in presets:
        yield step(preset, shape, None)
        yield step(preset, shape, PLACES)


def step(preset: Preset, shape: Shape, places: int | None) -> Case:
    """A training step, dense or with so many places for each row."""
    config = SAEConfig.preset(preset, shape.d, shape.concepts)
    optimizer = make_optimizer(1e-3, total_steps=1000)
    state = jax.eval_shape(lambda: init_train_state(config, optimizer, jax.random.key(0)))
    function = functools.partial(train_step, config, optimizer, capacity=places and Capacity(places, places))
    batch = jax.ShapeDtypeStruct((shape.rows, shape.d), jnp.float32)
    name, work = (f"{preset}, dense", DENSE_STEP) if places is None else (f"{preset}, at places", SPARSE_STEP[preset])
    return Case(f"step of {name}", function, (state, batch), work, donate=(0,))


def limit(chip: Chip, shape: Shape, work: Work, moved: float, places: int) -> float:
    """Seconds that a program takes at least."""
    product = 2 * shape.rows * shape.concepts * shape.d / chip.matmul_rate
    rows = work.touched * shape.rows * places * shape.d * 4
    return (work.rounded + 2 * work.products) * product + (moved + rows) / chip.bandwidth


def figures_of(chip: str, shape: Shape, case: Case, program: Program) -> dict[str, str | float]:
    """A line of the table."""
    work = case.work
    return {
        "GPU": chip,
        "program": case.name,
        "products GFLOP": 2 * (work.rounded + work.products) * shape.rows * shape.concepts * shape.d / GIGA,
        "rows of the dictionary MB": work.touched * shape.rows * PLACES * shape.d * 4 / MB,
        "all else MB": program.moved / MB,
        "limit us": limit(CHIPS[chip], shape, work, program.moved, PLACES) / US,
        "temporaries MB": program.memory.temp_size_in_bytes / MB,
        "sorts": program.count("sort"),
        "scatters": program.count("scatter"),
    }


def break_even(chip: str, shape: Shape, preset: Preset, moved: tuple[int, int]) -> dict[str, str | float]:
    """From how many places per row on the limit of the sparse step is above that of the dense one.

    Args:
      chip: of CHIPS.
      shape: of the step.
      preset: of the autoencoder.
      moved: bytes of the dense step and of the sparse one.
    """
    work = SPARSE_STEP[preset]
    dense = limit(CHIPS[chip], shape, DENSE_STEP, moved[0], 0)
    none, one = (limit(CHIPS[chip], shape, work, moved[1], places) for places in (0, 1))
    places = (dense - none) / (one - none)
    line: dict[str, str | float] = {"GPU": chip, "preset": preset, "width of a row": shape.d}
    return line | {"places per row": places, "one concept in": shape.concepts / places}


def tables(
    chips: tuple[str, ...], shape: Shape, presets: tuple[Preset, ...]
) -> tuple[list[dict[str, str | float]], list[dict[str, str | float]]]:
    """(a line for every program on every chip, one for every preset)."""
    lines, even = [], []
    for chip in chips:
        moved: dict[str, int] = {}
        for case in cases(shape, presets):
            program = compile_for(chip, case.function, *case.arguments, donate=case.donate)
            lines.append(figures_of(chip, shape, case, program))
            moved[case.name] = program.moved
        for preset in presets:
            both = moved[f"step of {preset}, dense"], moved[f"step of {preset}, at places"]
            even.append(break_even(chip, shape, preset, both))
    return lines, even


def main(
    chips: tuple[str, ...] = tuple(CHIPS),
    presets: tuple[Preset, ...] = tuple(SPARSE_STEP),
    rows: int = 4096,
    widths: tuple[int, ...] = (768, 4096),
    concepts: int = 49_152,
) -> None:
    """Compile a training step and its parts for GPUs and tabulate what they move.

    Args:
      chips: names of benchmarks.gpu_compiler.CHIPS.
      presets: of the steps, out of sparsemax and topk.
      rows: of a batch.
      widths: of a row, a table for each.
      concepts: of the dictionary.
    """
    jax.config.update("jax_platforms", "cpu")
    figures, all_even = [], []
    for d in widths:
        lines, even = tables(chips, Shape(rows, d, concepts), presets)
        title = f"{rows} x {d}, {concepts} concepts, {PLACES} places. Compiled only: nothing of this has run on a GPU."
        figures.append(Figures(title, tuple(lines)))
        all_even += even
    figures.append(Figures("Dense and sparse steps have the same limit", tuple(all_even)))
    publish("compiled_gpu", [], figures=figures)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.compiled_gpu")
