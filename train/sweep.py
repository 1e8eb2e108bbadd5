"""Training many runs in lock-step on one stream of batches, which is read once for all of them."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jax_sae import (
    SAEConfig,
    TrainState,
    capacity_limit,
    init_train_state,
    member_state,
    stack_states,
    sweep_train_step,
)
from jax_sae.data import ActivationSet, Statistics, load_batches, prefetch_to_device
from jax_sae.training import Metrics

from .adaptive import AdaptiveStep
from .checkpoint import Checkpoints, abstract
from .config import ResolvedConfig
from .files import read_json, write_json
from .logs import PendingMetrics, RunLog, averaged
from .loop import order_seed, record, stop_signals, stopped, validate
from .run import abstract_state_of, optimizer_of


def train_together(
    runs: Sequence[ResolvedConfig], activations: ActivationSet, statistics: Statistics, workdir: Path
) -> bool:
    """Trains, or goes on training, runs that see the same batches, each in its own folder, on one device.

    They go on from the last step that all of them have a checkpoint for. Stopped at any moment and started again,
    they end with the parameters, bit for bit, of runs that never stopped.

    A run whose loss is no longer finite is left out from then on, the others go on: its last checkpoint is kept, and
    :func:`failure` tells why it ended.

    Args:
      runs: with the same steps, batch size, seed of the order and logging; their folders hold a config.json.
      activations: the set, without its non-finite rows.
      statistics: of its training rows.
      workdir: what to name when a signal ends the training early.

    Returns:
      Whether all are at their end; False after SIGTERM or Ctrl-C.

    Raises:
      InputError: a checkpoint is damaged.
      OSError: a checkpoint cannot be written; those before it are whole.
    """
    with contextlib.ExitStack() as opened:
        members = [_Member(run, opened) for run in runs if failure(run) is None]
        if not members:
            return True
        steps = members[0].config.steps
        start = max(set.intersection(*(member.checkpoints.steps() for member in members)), default=0)
        if start == steps:
            return True
        for member in members:
            member.start_at(start, opened)
        groups = [_Group(group, start, statistics) for group in _of_one_shape(members)]
        loop = _Sweep(members, groups, activations, start)
        stopped_by = loop.run()
    if stopped_by is not None:
        print(stopped(stopped_by, loop.step, steps, workdir))
    return stopped_by is None


def failure(run: ResolvedConfig) -> dict[str, Any] | None:
    """Where and why the training of a run ended early: ``step`` and ``reason``; None for a healthy one."""
    path = _failure_file(run)
    return read_json(path) if path.exists() else None


def _failure_file(run: ResolvedConfig) -> Path:
    assert run.train.workdir is not None  # resolved
    return run.train.workdir / "failed.json"


class _Member:
    """One of the runs: its folder's checkpoints and log."""

    log: RunLog

    def __init__(self, run: ResolvedConfig, opened: contextlib.ExitStack):
        assert run.train.workdir is not None  # resolved
        self.run, self.config, self.workdir = run, run.train, run.train.workdir
        self.checkpoints = opened.enter_context(contextlib.closing(Checkpoints(self.workdir / "checkpoints")))
        self.healthy = True

    def start_at(self, step: int, opened: contextlib.ExitStack) -> None:
        """Forgets what came after ``step``, which not all members have."""
        self.checkpoints.delete_after(step)
        log = RunLog(
            self.workdir, step=step, steps=self.config.steps, batch_size=self.config.batch_size, progress=False
        )
        self.log = opened.enter_context(contextlib.closing(log))

    def fail(self, step: int, reason: str) -> None:
        """Leaves this run out from now on, and says so."""
        self.healthy = False
        write_json(_failure_file(self.run), {"step": step, "reason": reason})
        tqdm.write(f"{self.workdir.name}: {reason} at step {step}; it is left out, the others go on")


def _of_one_shape(members: Sequence[_Member]) -> list[list[_Member]]:
    """Members whose autoencoders are equal but for k, together."""
    groups: dict[SAEConfig, list[_Member]] = {}
    for member in members:
        groups.setdefault(dataclasses.replace(member.run.sae, k=1), []).append(member)
    return list(groups.values())


class _Group:
    """Members of one shape: their states, stacked, and the step that takes all of them."""

    def __init__(self, members: list[_Member], start: int, statistics: Statistics):
        self.members = members
        self.config = dataclasses.replace(members[0].run.sae, k=max(member.run.sae.k for member in members))
        config = members[0].config
        step = functools.partial(sweep_train_step, self.config, lambda rate: optimizer_of(config, rate))
        self._rates = jnp.asarray([member.config.learning_rate for member in members], jnp.float32)
        states = [self._restored(member, start) if start else self._fresh(member, statistics) for member in members]
        self._states = jax.device_put(stack_states(states), jax.local_devices()[0])
        # Members that are batched would all be computed both ways: a conditional in vmap takes both of its branches.
        limit = capacity_limit(self.config) if jax.default_backend() == "cpu" else None
        self._step = AdaptiveStep(
            self.config, lambda capacity: step(capacity=capacity), self._states, asked="auto", limit=limit
        )

    def step(self, number: int, batch: jax.Array) -> Metrics:
        """One step of every member, ``number`` done before; the metrics have a leading axis of members."""
        self._states, metrics = self._step(number, self._states, self._rates, batch)
        return metrics

    def state(self, member: int) -> TrainState:
        return member_state(self._states, member)

    def _fresh(self, member: _Member, statistics: Statistics) -> TrainState:
        key = jax.random.key(member.config.seed)
        state = init_train_state(self.config, optimizer_of(member.config), key, statistics)
        stats = dataclasses.replace(state.stats, k=jnp.int32(member.run.sae.k))
        return jax.device_get(dataclasses.replace(state, stats=stats))

    def _restored(self, member: _Member, step: int) -> TrainState:
        shapes = abstract_state_of(dataclasses.replace(member.run, sae=self.config))
        return jax.device_get(member.checkpoints.restore(abstract(shapes), step))


class _Sweep:
    """The I/O around the steps: one batch in for all groups; metrics and checkpoints out for every member."""

    def __init__(self, members: list[_Member], groups: list[_Group], activations: ActivationSet, start: int):
        self._members, self._groups = members, groups
        self._activations = activations
        self._config = members[0].config
        self.step = start

    def run(self) -> int | None:
        """Steps until the end or until no member is healthy; a signal that ended it before is returned."""
        config = self._config
        with (
            contextlib.closing(self._progress()) as progress,
            contextlib.closing(self._batches()) as batches,
            stop_signals() as stop,
        ):
            self._pending = PendingMetrics(batch_size=config.batch_size, log_every=config.log_every)
            stopping = False
            while self.step < config.steps and not stopping and any(m.healthy for m in self._members):
                with self._pending.waiting_for_input():
                    batch = next(batches)
                metrics = [group.step(self.step, batch) for group in self._groups]
                self.step += 1
                self._pending.add(self.step, metrics)
                progress.update(config.batch_size * len(self._members))
                stopping = bool(stop)  # asked once: a signal after this is dealt with after the next step
                if stopping or self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    self._save()
                elif self.step % config.log_every == 0:
                    self._deliver()
            self._wait()
        return stop[0] if stopping and self.step < config.steps else None

    def _progress(self) -> tqdm:
        rows = self._config.batch_size * len(self._members)
        return tqdm(
            total=self._config.steps * rows,
            initial=self.step * rows,
            desc=f"train {len(self._members)} runs",
            unit=" rows",
            unit_scale=True,
            disable=None,
        )

    def _batches(self) -> Generator[jax.Array]:
        config = self._config
        rows = load_batches(
            self._activations, config.batch_size, order_seed(config), start=self.step, stop=config.steps
        )
        return prefetch_to_device(rows, sharding=jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))

    def _healthy(self) -> Iterator[tuple[int, int, _Member]]:
        """(index of the group, index in it, member) of those that are not left out."""
        for g, group in enumerate(self._groups):
            for i, member in enumerate(group.members):
                if member.healthy:
                    yield g, i, member

    def _deliver(self, everything: bool = False) -> None:
        """Logs what :meth:`PendingMetrics.fetch` gives for every member, and leaves out those that diverged."""
        values, timing = self._pending.fetch(everything=everything)
        for g, i, member in self._healthy():
            own = [(step, {name: value[i] for name, value in metrics[g].items()}) for step, metrics in values]
            bad = next((step for step, metrics in own if not np.isfinite(metrics["loss"])), None)
            finite = [item for item in own if bad is None or item[0] < bad]
            for step, means in averaged(finite, self._config.log_every):
                member.log.write(record(member.config, step, means) | timing)
            if bad is not None:
                member.fail(bad, "the loss is not finite")

    def _save(self) -> None:
        """Delivers every metric, validates every member, and starts writing its checkpoint.

        Nothing is written before all of the last checkpoints are on disk. So at any moment all members have the
        last step in common, or the one before it, which is among the latest two that each keeps.
        """
        self._deliver(everything=True)
        self._wait()
        for g, i, member in self._healthy():
            state = self._groups[g].state(i)
            metrics = validate(member.config, self._groups[g].config, state, self._activations)
            if not all(map(math.isfinite, metrics.values())):
                member.fail(self.step, "the validation loss is not finite")
                continue
            if metrics:
                member.log.write({"step": self.step, **metrics})
            member.checkpoints.save(state, self.step, metrics)
        self._pending.restart_clock()

    def _wait(self) -> None:
        for member in self._members:
            member.checkpoints.wait()
