"""Logs of a run: metrics off the devices, metrics.jsonl, TensorBoard events, a progress bar on a terminal."""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from .files import write_text


class RunLog:
    """Writes records of a run to ``metrics.jsonl`` and to TensorBoard, and shows them on a progress bar.

    Args:
      workdir: of the run.
      step: where the run starts or resumes; records of later steps, which a killed process may have
        written after its last checkpoint, are removed first.
      steps: where it ends.
      batch_size: rows per step.
      progress: whether to show the bar.
    """

    def __init__(self, workdir: Path, *, step: int, steps: int, batch_size: int, progress: bool = True):
        path = workdir / "metrics.jsonl"
        _keep_until(path, step)
        self._lines = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        self._bar = tqdm(
            total=steps * batch_size,
            initial=step * batch_size,
            unit=" rows",
            unit_scale=True,
            desc="train",
            disable=None if progress else True,
        )
        self._batch_size = batch_size

    def advance(self, steps: int) -> None:
        """Moves the progress bar."""
        self._bar.update(steps * self._batch_size)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record; it has a ``step`` and scalars."""
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        for name, value in record.items():
            if name != "step":
                self._events.add_scalar(name, value, record["step"])
        shown = {name: f"{record[name]:.4g}" for name in ("loss", "fvu", "active", "val_fvu") if name in record}
        self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Flushes everything to disk."""
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self._lines.close()
        self._events.close()
        self._bar.close()


class PendingMetrics:
    """Metrics of steps that the devices may still be at work on, and the time that the steps take.

    Args:
      batch_size: rows per step.
      log_every: steps that :func:`averaged` puts into one record.
      steps_per_call: steps that one dispatch takes.
    """

    def __init__(self, *, batch_size: int, log_every: int, steps_per_call: int = 1):
        self._rows_per_call = batch_size * steps_per_call
        self._calls_per_record = log_every // steps_per_call
        self._pending: list[tuple[int, Any]] = []
        self._waited = 0.0
        self._began = self._clock = time.perf_counter()

    def add(self, step: int, metrics: Any) -> None:
        """Notes what a call that ended with ``step`` gave: any tree of arrays on devices."""
        self._pending.append((step, metrics))

    @contextlib.contextmanager
    def waiting_for_input(self) -> Iterator[None]:
        """Counts the time within as spent waiting for data."""
        asked = time.perf_counter()
        yield
        self._waited += time.perf_counter() - asked

    def restart_clock(self) -> None:
        """Leaves the time until now, of a validation say, out of the next rate."""
        self._clock = time.perf_counter()

    def fetch(self, *, everything: bool = False) -> tuple[list[tuple[int, Any]], dict[str, float]]:
        """Brings metrics to the host.

        While the devices are still at work on the newest steps, those are left for the next time, so that nothing
        waits for them here; with ``everything`` it does.

        Returns:
          ((step, metrics) of every call, the timing of these calls).
        """
        newest = 0
        if not everything and not all(leaf.is_ready() for leaf in jax.tree.leaves(self._pending[-1][1])):
            newest = self._calls_per_record
        count = len(self._pending) - newest
        if count <= 0:
            return [], {}
        ready, self._pending = self._pending[:count], self._pending[count:]
        values = [(step, jax.device_get(metrics)) for step, metrics in ready]
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        waited, self._waited = self._waited, 0.0
        return values, {
            "rows_per_second": count * self._rows_per_call / seconds,
            "input_wait_fraction": waited / seconds,
            "elapsed_seconds": now - self._began,
        }


def averaged(
    values: Sequence[tuple[int, dict[str, np.ndarray]]], log_every: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """The means of the metrics of every ``log_every`` consecutive steps, under the number of the last."""
    for _, group in itertools.groupby(values, key=lambda item: (item[0] - 1) // log_every):
        window = list(group)
        yield window[-1][0], {name: float(np.mean([v[name] for _, v in window])) for name in window[0][1]}


def _keep_until(path: Path, step: int) -> None:
    """Drops the records of ``path`` after ``step``, and a last line that a killed process left torn."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    write_text(path, "".join(kept))
