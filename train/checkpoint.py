"""Checkpoints: Orbax behind two questions, what is there and give me that one."""

from pathlib import Path
from typing import Any, Literal

import jax
from orbax.checkpoint import v1 as ocp

from jax_sae import InputError, TrainState

Which = Literal["latest", "best"]


class Checkpoints:
    """The checkpoints of one run: the latest two and the best, each atomic and written in the background.

    A process killed while it writes leaves a temporary folder that is never taken for a checkpoint.

    Args:
      folder: where they are; made when the first one is saved.
    """

    def __init__(self, folder: Path):
        policies = ocp.training.preservation_policies
        self._folder = folder
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(2),
                    policies.BestN(get_metric_fn=_validation_fvu, n=1, reverse=True),
                ]
            ),
            cleanup_tmp_directories=True,
        )

    def save(self, state: TrainState, step: int, metrics: dict[str, float]) -> None:
        """Starts writing ``state``; waits first for the one before it, so that none is ever dropped.

        Raises:
          OSError: the checkpoint before it, or this one, cannot be written (a full disk, say).
        """
        try:
            self._checkpointer.wait()
            self._checkpointer.save_async(step, state, force=True, metrics=metrics)
        except Exception as error:
            raise _as_os_error(error, self._folder) from error

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          OSError: something could not be written.
        """
        try:
            self._checkpointer.wait()
        except Exception as error:
            raise _as_os_error(error, self._folder) from error

    def step(self, which: Which = "latest") -> int | None:
        """The step of the latest checkpoint, or of the best by validation FVU; None without any."""
        found = self._checkpointer.checkpoints
        if not found:
            return None
        if which == "best":
            return min(found, key=lambda c: (_validation_fvu(c.metrics or {}), -c.step)).step
        return max(c.step for c in found)

    def steps(self) -> set[int]:
        """The steps of all checkpoints."""
        return {found.step for found in self._checkpointer.checkpoints}

    def delete_after(self, step: int) -> None:
        """Removes the checkpoints of later steps."""
        for later in sorted(found for found in self.steps() if found > step):
            self._checkpointer.delete(later)

    def restore(self, abstract_state: TrainState, step: int) -> TrainState:
        """The state saved at ``step``, on the devices of ``abstract_state``.

        Args:
          abstract_state: shapes, dtypes and shardings (``jax.ShapeDtypeStruct`` leaves).
          step: one of those saved.

        Raises:
          InputError: the files are damaged or belong to another program.
        """
        try:
            return self._checkpointer.load(step, abstract_state)
        except (ValueError, KeyError, OSError) as error:
            raise InputError(
                f"cannot read the checkpoint of step {step} in {self._folder} ({error}); "
                "remove that step's folder to go on from the one before it"
            ) from error

    def close(self) -> None:
        """Waits for what is being written and lets go of the folder."""
        self._checkpointer.close()


def abstract(state: Any, shardings: Any = None) -> Any:
    """``state`` as shapes, dtypes and shardings; on the default device where ``shardings`` is None."""
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, state)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )


def _validation_fvu(metrics: dict[str, Any]) -> float:
    return metrics.get("val_fvu", float("inf"))


def _as_os_error(error: BaseException, folder: Path) -> OSError:
    """The operating system's error that Orbax wrapped, with the folder's name in it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    found = cause if cause is not None else error
    return OSError(f"cannot write a checkpoint to {folder} ({found}); the checkpoints before it are whole")
