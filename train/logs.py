"""Logs of a run: metrics.jsonl, TensorBoard events, and a progress bar on a terminal."""

import json
import os
from pathlib import Path
from typing import Any

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
    """

    def __init__(self, workdir: Path, *, step: int, steps: int, batch_size: int):
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
            disable=None,
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


def _keep_until(path: Path, step: int) -> None:
    """Drops the records of ``path`` after ``step``, and a last line that a killed process left torn."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    write_text(path, "".join(kept))
