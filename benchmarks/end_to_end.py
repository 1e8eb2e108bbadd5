"""Rows per second of whole training runs from a set on disk: ``python -m train`` against SAELens, dictionary_learning.

    python -m benchmarks.end_to_end
    python -m benchmarks.end_to_end --batch-size 4096 --steps 40 --checkpoint-every 20

All train a TopK autoencoder of the same size on the same batches, through the loop that users call: ours through the
entry of ``python -m train``, SAELens' ``SAETrainer.fit``, dictionary_learning's ``trainSAE``. The peers get their
batches from our loader. All log (the peers to the terminal, whose output is dropped) and write one checkpoint within
the time that counts; dictionary_learning's holds the weights alone, the others' the optimizer's state as well. No
concept counts as dead, so none computes an auxiliary loss; ours does not validate, since the peers do not.

The time per step is that of the steps after ``checkpoint_every``, until the last: it leaves out imports, compilation,
reading the data's statistics and checking its sums. The whole call, printed beside it, leaves out imports alone.
The baseline is our step alone, on batches that are on the device already: the loop's share of its rate is what
loading, logging and checkpoints leave of it. The limit is that of :mod:`benchmarks.train_step`. Freed memory is kept
(:func:`jax_sae.keep_freed_memory`), for the peers alike.
"""

import contextlib
import functools
import importlib
import io
import itertools
import json as json_text
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks import torch_steps
from benchmarks.harness import Figures, Samples, Table, interleave, paired_ratio, tabulate
from benchmarks.loader import write_set
from benchmarks.results import publish
from benchmarks.shapes import SHAPES, Shape
from benchmarks.train_step import (
    initial_state,
    limit_seconds,
    matmul_name,
    optimizer,
    parameter_count,
    rates_at,
    settled_capacity,
)
from jax_sae import SAEConfig, jit_train_step
from jax_sae.data import ActivationSet, load_batches
from train.config import Overrides, TrainConfig
from train.loop import train

LEARNING_RATE = 1e-4
LOG_EVERY = 20
BARE, OURS = "our step alone", "python -m train"
NEVER_DEAD = 2**30


@dataclass(frozen=True)
class Plan:
    """A run: the autoencoder, the data, the length, and after how many steps it is timed and saved."""

    sae: SAEConfig
    activations: ActivationSet
    batch_size: int
    steps: int
    checkpoint_every: int

    @property
    def timed_steps(self) -> int:
        return self.steps - self.checkpoint_every

    def batches(self) -> Iterator[np.ndarray]:
        """What all of them train on."""
        return load_batches(self.activations, self.batch_size, seed=0, stop=self.steps)


@dataclass(frozen=True)
class Timing:
    """Seconds of the steps that count, and of the whole call."""

    timed: float
    whole: float


class Requests:
    """An iterator that notes when each of its items was asked for, in ``seconds``."""

    def __init__(self, items: Iterable[Any]):
        self._items = iter(items)
        self.seconds: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.seconds.append(time.perf_counter())
        return next(self._items)


def our_run(plan: Plan, folder: Path) -> Timing:
    """``python -m train``, from the call to its return; every checkpoint's log line was waited for by all devices."""
    config = TrainConfig(
        preset="topk",
        data=plan.activations.path,
        workdir=folder,
        steps=plan.steps,
        batch_size=plan.batch_size,
        n_concepts=plan.sae.n_concepts,
        learning_rate=LEARNING_RATE,
        checkpoint_every=plan.checkpoint_every,
        log_every=min(LOG_EVERY, plan.checkpoint_every),
        validation_rows=0,
        parallel="jit",
        sae=Overrides(k=plan.sae.k, dead_after_rows=NEVER_DEAD),
    )
    began = time.perf_counter()
    train(config)
    whole = time.perf_counter() - began
    records = [json_text.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    elapsed = {record["step"]: record["elapsed_seconds"] for record in records if "elapsed_seconds" in record}
    return Timing(elapsed[plan.steps] - elapsed[plan.checkpoint_every], whole)


def bare_steps(plan: Plan, capacity: Any, folder: Path) -> Timing:
    """Our step in a loop over batches on the device, with the capacity of the run."""
    began = time.perf_counter()
    step, state = jit_train_step(plan.sae, optimizer(), capacity=capacity), initial_state(plan.sae)
    batches = [jax.device_put(batch) for batch in itertools.islice(plan.batches(), 4)]
    turns = itertools.cycle(batches)
    for _ in range(4):
        state, _ = step(state, next(turns))
    jax.block_until_ready(state)
    warm = time.perf_counter()
    for _ in range(plan.timed_steps):
        state, metrics = step(state, next(turns))
    jax.block_until_ready((state, metrics))
    ended = time.perf_counter()
    return Timing(ended - warm, ended - began)


def saelens_run(plan: Plan, folder: Path) -> Timing:
    """SAELens' trainer on its TopK autoencoder, as it comes."""
    config_of, trainer_of = (importlib.import_module(f"sae_lens.{name}") for name in ("config", "training.sae_trainer"))
    began = time.perf_counter()
    settings = config_of.SAETrainerConfig(
        total_training_samples=plan.steps * plan.batch_size,
        train_batch_size_samples=plan.batch_size,
        lr=LEARNING_RATE,
        lr_end=LEARNING_RATE,
        device=torch_steps.torch_device(),
        n_checkpoints=plan.steps // plan.checkpoint_every - 1,
        checkpoint_path=str(folder),
    )
    requests = Requests(torch_batches(plan))
    trainer_of.SAETrainer(settings, torch_steps.saelens_topk(plan.sae), requests).fit()
    return timing_of(plan, requests.seconds, began, time.perf_counter())


def dictionary_learning_run(plan: Plan, folder: Path) -> Timing:
    """dictionary_learning's loop over its TopK trainer, as it comes."""
    training, top_k = (
        importlib.import_module(f"dictionary_learning.{name}") for name in ("training", "trainers.top_k")
    )
    began = time.perf_counter()
    settings = torch_steps.dictionary_learning_settings(plan.sae, LEARNING_RATE, plan.steps)
    requests = Requests(torch_batches(plan))
    training.trainSAE(
        data=requests,
        trainer_configs=[{"trainer": top_k.TopKTrainer, **settings}],
        steps=plan.steps,
        save_steps=list(range(plan.checkpoint_every, plan.steps, plan.checkpoint_every)),
        save_dir=str(folder),
        log_steps=LOG_EVERY,
        verbose=True,
        device=torch_steps.torch_device(),
    )
    return timing_of(plan, requests.seconds, began, time.perf_counter())


def torch_batches(plan: Plan) -> Iterator[Any]:
    import torch

    return (torch.from_numpy(np.asarray(batch)).float() for batch in plan.batches())


def timing_of(plan: Plan, requests: list[float], began: float, returned: float) -> Timing:
    """From when each batch was asked for, which is when all steps before it were done.

    The end is the request after the last batch; the return, where there is none.
    """
    ended = requests[plan.steps] if len(requests) > plan.steps else returned
    return Timing(ended - requests[plan.checkpoint_every], returned - began)


def runs(plan: Plan, peers: bool) -> dict[str, Callable[[Plan, Path], Timing]]:
    """The candidates, as far as they are installed."""
    capacity = settled_capacity(plan.sae, [jax.device_put(b) for b in itertools.islice(plan.batches(), 4)])
    found: dict[str, Callable[[Plan, Path], Timing]] = {
        BARE: lambda plan, folder: bare_steps(plan, capacity, folder),
        OURS: our_run,
    }
    for package, run in {"sae_lens": saelens_run, "dictionary_learning": dictionary_learning_run}.items():
        if peers and not torch_steps.missing("torch", package):
            found[package] = run
    return found


def sample(plan: Plan, candidates: dict[str, Callable[[Plan, Path], Timing]], rounds: int) -> tuple[Samples, Samples]:
    """Seconds per step of those that count, and of the whole call."""
    whole: dict[str, list[float]] = {name: [] for name in candidates}

    def seconds(name: str) -> float:
        quiet = contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO())
        with tempfile.TemporaryDirectory() as folder, quiet[0], quiet[1]:
            timing = candidates[name](plan, Path(folder))
        whole[name].append(timing.whole)
        return timing.timed / plan.timed_steps

    per_step = interleave({name: functools.partial(seconds, name) for name in candidates}, rounds=rounds)
    return per_step, {name: tuple(values) for name, values in whole.items()}


def run_table(plan: Plan, *, rounds: int, peers: bool, limit: float) -> tuple[Table, Figures]:
    """The time per step of every candidate, and what the loop leaves of our step's rate."""
    per_step, whole = sample(plan, runs(plan, peers), rounds)
    title = f"topk, B = {plan.batch_size}, d = {plan.sae.d_in}, M = {plan.sae.n_concepts:,}, k = {plan.sae.k}"
    table = tabulate(title, per_step, baseline=BARE, limits=dict.fromkeys(per_step, limit), items=plan.batch_size)
    rows = plan.steps * plan.batch_size
    shares: tuple[dict[str, str | float], ...] = tuple(
        {
            "run": name,
            "of the rate of our step alone %": 100 / paired_ratio(seconds, per_step[BARE]),
            "whole call s": float(np.median(whole[name])),
            "whole call rows/s": rows / float(np.median(whole[name])),
        }
        for name, seconds in per_step.items()
        if name != BARE
    )
    return table, Figures(f"What the loop leaves, and the whole call of {plan.steps} steps with its start", shares)


def main(
    shape: str = "text",
    batch_size: int | None = None,
    k: int = 32,
    steps: int = 100,
    checkpoint_every: int = 50,
    rounds: int = 1,
    peers: bool = True,
    json: Path | None = None,
) -> None:
    """Benchmark whole training runs.

    Args:
      shape: a name of benchmarks.shapes.
      batch_size: rows per step; those of the shape without it.
      k: active concepts per row.
      steps: length of each run; a multiple of checkpoint_every.
      checkpoint_every: steps between checkpoints, and before the ones that are timed.
      rounds: runs of each candidate.
      peers: run PyTorch's too.
      json: folder for the JSON in place of benchmarks/results.
    """
    torch_steps.prepare(*("torch", "sae_lens", "dictionary_learning") if peers else ())
    named = SHAPES[shape]
    size = Shape(batch_size or named.rows, named.d, named.concepts)
    sae = SAEConfig.preset("topk", size.d, size.concepts, k=k, dead_after_rows=NEVER_DEAD)
    rates = rates_at([size])
    limit = limit_seconds(size, parameter_count(sae), matmul=rates[matmul_name(size)], copy=rates["copy B/s"])
    with tempfile.TemporaryDirectory() as folder:
        activations = write_set(Path(folder) / "set", 32 * size.rows, size.d, "float32")
        plan = Plan(sae, activations, size.rows, steps, checkpoint_every)
        table, figures = run_table(plan, rounds=rounds, peers=peers, limit=limit)
    publish("end_to_end", [table], figures=[figures], rates=rates, root=json)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.end_to_end")
