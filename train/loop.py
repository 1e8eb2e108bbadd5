"""The training loop: it reads, dispatches, logs and saves; everything it computes is in the step."""

import contextlib
import math
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from jax_sae import Capacity, SAEConfig, TrainState, capacity_limit, eval_step, init_train_state
from jax_sae.data import ActivationSet, load_batches, prefetch_to_device

from .adaptive import AdaptiveStep
from .checkpoint import Checkpoints, abstract
from .cli import RunFailed
from .config import ResolvedConfig, TrainConfig, resolve, workdir_of
from .files import make_writable_folder, write_json
from .logs import PendingMetrics, RunLog, averaged
from .parallel import Placement, place
from .run import (
    abstract_state_of,
    learning_rate_at,
    open_data,
    optimizer_of,
    refuse_other_run,
    survey,
    verify,
)


def train(config: TrainConfig) -> Path:
    """Trains, or goes on training, the run in ``config.workdir``.

    A run that was stopped at any moment and started again ends with the parameters, bit for bit, of one
    that never stopped, on the same devices. The order in which things are found and restored:

    Returns:
      The workdir.

    Raises:
      InputError: bad flags, bad data, or a workdir of another run.
      RunFailed: the loss is no longer finite.
    """
    # 1. Everything that may be refused, before anything is written.
    config.validate()
    assert config.data is not None, "the command line fills in the default set"
    activations = open_data(config.data, holdout=config.holdout)
    resolved = resolve(config, activations)
    optimizer = optimizer_of(resolved.train)
    placement = place(resolved, optimizer)
    workdir = make_writable_folder(workdir_of(config))
    refuse_other_run(workdir, resolved)
    with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        start = checkpoints.step() or 0
        # 2. The bytes of the data, and what has to be known of them: statistics, rows to leave out.
        if start == 0 and config.verify:
            verify(activations)
        activations, statistics = survey(activations, workdir, drop_non_finite=config.drop_non_finite)
        # 3. From here on the workdir is this run's.
        write_json(workdir / "config.json", resolved.to_json())
        # 4. The state, from the checkpoint or fresh, on its devices.
        shapes = abstract_state_of(resolved)
        if start:
            state = checkpoints.restore(abstract(shapes, placement.state(shapes)), start)
        else:
            key = jax.random.key(config.seed)
            state = init_train_state(resolved.sae, optimizer, key, statistics)
            state = jax.device_put(state, placement.state(shapes))
        # 5. The rest of the run; the step is the position in the data.
        if start < config.steps:
            _Loop(resolved, activations, placement, checkpoints, workdir, start).run(state)
    return workdir


class _Loop:
    """The I/O around the step: batches in, metrics and checkpoints out."""

    def __init__(
        self,
        resolved: ResolvedConfig,
        activations: ActivationSet,
        placement: Placement,
        checkpoints: Checkpoints,
        workdir: Path,
        start: int,
    ):
        self._resolved, self._config = resolved, resolved.train
        self._activations = activations
        self._placement = placement
        self._checkpoints = checkpoints
        self._workdir = workdir
        self._step = start

    def run(self, state: TrainState) -> None:
        """Steps until the end of the run, or until a signal asks it to stop."""
        config, every_step = self._config, self._config.steps_per_call
        batch_size = config.batch_size
        with (
            contextlib.closing(
                RunLog(self._workdir, step=self._step, steps=config.steps, batch_size=batch_size)
            ) as self._log,
            contextlib.closing(self._batches()) as batches,
            stop_signals() as stop,
        ):
            self._pending = PendingMetrics(batch_size=batch_size, log_every=config.log_every, steps_per_call=every_step)
            step = AdaptiveStep(
                self._resolved.sae,
                self._placement.step,
                state,
                asked=config.capacity,
                limit=None if self._placement.name == "mesh" else capacity_limit(self._resolved.sae),
                steps_per_call=every_step,
            )
            self._capacity = step.capacity
            while self._step < config.steps:
                with self._pending.waiting_for_input():
                    batch = next(batches)
                state, metrics = step(self._step, state, batch)
                self._note_capacity(step.capacity)
                self._step += every_step
                self._pending.add(self._step, metrics)
                self._log.advance(every_step)
                stopping = bool(stop)  # asked once: a signal after this is dealt with after the next step
                if stopping or self._step % config.checkpoint_every == 0 or self._step == config.steps:
                    self._save(state)
                elif self._step % config.log_every == 0:
                    self._deliver()
                if stopping:
                    break
            self._checkpoints.wait()
        if self._step < config.steps:
            print(stopped(stop[0], self._step, config.steps, self._workdir))

    def _note_capacity(self, capacity: Capacity | None) -> None:
        """Logs, with the first step of it, a change of the places for active concepts; 0 for the dense step."""
        if capacity != self._capacity:
            row, mean = capacity or (0, 0)
            self._log.write({"step": self._step + 1, "capacity_row": row, "capacity_mean": mean})
            self._capacity = capacity

    def _batches(self) -> Generator[jax.Array]:
        """Batches from the current step on, on their devices before they are needed."""
        config, group = self._config, self._config.steps_per_call
        rows = load_batches(
            self._activations,
            config.batch_size,
            order_seed(config),
            start=self._step,
            stop=config.steps,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        if group > 1:
            rows = _stacked(rows, group)
        return prefetch_to_device(rows, sharding=self._placement.batch)

    def _deliver(self, everything: bool = False) -> None:
        """Logs what :meth:`PendingMetrics.fetch` gives, a record for every ``log_every`` steps."""
        values, timing = self._pending.fetch(everything=everything)
        self._require_finite([step for step, _ in values], [v["loss"] for _, v in values])
        for step, means in averaged(values, self._config.log_every):
            self._log.write(record(self._config, step, means) | timing)

    def _require_finite(self, steps: list[int], losses: list[np.ndarray]) -> None:
        """Raises RunFailed naming the first steps whose loss is not finite; nothing of them was saved."""
        every = self._config.steps_per_call
        bad = [
            step - every + 1 + i
            for step, loss in zip(steps, losses, strict=True)
            for i in np.flatnonzero(~np.isfinite(np.atleast_1d(loss)))
        ]
        if bad:
            saved = self._checkpoints.step()
            kept = f"the checkpoint of step {saved} is kept" if saved else "no checkpoint was written yet"
            raise RunFailed(
                f"the loss is not finite at step{'s' * (len(bad) > 1)} {', '.join(map(str, bad[:8]))}; {kept}; "
                "lower --learning-rate, or set --clip-norm, in a new --workdir"
            )

    def _save(self, state: TrainState) -> None:
        """Delivers every metric, validates, and starts writing a checkpoint."""
        self._deliver(everything=True)
        metrics = self._validate(state)
        if metrics:
            self._log.write({"step": self._step, **metrics})
        self._checkpoints.save(state, self._step, metrics)
        self._pending.restart_clock()

    def _validate(self, state: TrainState) -> dict[str, float]:
        means = validate(self._config, self._resolved.sae, state, self._activations)
        if not all(map(math.isfinite, means.values())):
            raise RunFailed(f"the validation loss is not finite at step {self._step}; the checkpoint before it is kept")
        return means


_eval_step = jax.jit(eval_step, static_argnums=0)


def validate(config: TrainConfig, sae: SAEConfig, state: TrainState, activations: ActivationSet) -> dict[str, float]:
    """Means over the first held-out rows, as ``val_*``; empty when no rows are held out."""
    first = activations.train_rows
    last = min(first + config.validation_rows, activations.rows)
    totals: dict[str, float] = {}
    for begin in range(first, last, config.batch_size):
        x = activations.read(begin, min(begin + config.batch_size, last))
        values = jax.device_get(_eval_step(sae, state.model, state.stats, x))
        for name in ("loss", "fvu", "active"):
            totals[f"val_{name}"] = totals.get(f"val_{name}", 0.0) + float(values[name]) * len(x)
    return {name: total / (last - first) for name, total in totals.items()}


def order_seed(config: TrainConfig) -> int:
    """The seed of the order of the data."""
    return config.seed if config.data_seed is None else config.data_seed


def record(config: TrainConfig, step: int, means: dict[str, float]) -> dict[str, Any]:
    """A line of metrics.jsonl, but for the timing."""
    return {
        "step": step,
        "rows": step * config.batch_size,
        **means,
        "learning_rate": learning_rate_at(config, step),
    }


def stopped(number: int, step: int, steps: int, workdir: Path) -> str:
    """What to tell someone whose signal ended a run early."""
    return (
        f"stopped by {signal.Signals(number).name} at step {step} of {steps}, saved in {workdir}; "
        "run the same command again to go on"
    )


def _stacked(batches: Iterator[np.ndarray], group: int) -> Iterator[np.ndarray]:
    """Groups of consecutive batches as one array [group, B, d]."""
    for first in batches:
        yield np.stack([first, *(next(batches) for _ in range(group - 1))])


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT put their number in; a second signal acts as it did before."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for known, handler in before.items():
            signal.signal(known, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
