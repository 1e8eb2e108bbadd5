"""How a step is spread over devices: where the state and the batches live, and the compiled step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jax_sae import Capacity, InputError, jit_train_step, mesh_train_step, pmap_train_step, state_shardings
from jax_sae.training import Step

from .config import ResolvedConfig


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a step is compiled and where its arguments go.

    Attributes:
      step: from places for active concepts, None for the dense step, to ``step(state, batch) -> (state, metrics)``.
      batch: sharding of a batch.
      mesh: the devices.
      name: jit, pmap or mesh.
    """

    step: Callable[[Capacity | None], Step]
    batch: Sharding
    mesh: Mesh
    name: str

    def state(self, abstract_state: Any) -> Any:
        """The sharding of every leaf of a state, or the one sharding of all of them."""
        if self.name == "jit":
            return self.batch
        if self.name == "pmap":
            return NamedSharding(self.mesh, P())
        return state_shardings(abstract_state, self.mesh)


def place(resolved: ResolvedConfig, optimizer: optax.GradientTransformation) -> Placement:
    """The placement that ``--parallel`` asks for on the devices that are there.

    Raises:
      InputError: the devices, the batch or the dictionary cannot be split as asked.
    """
    config = resolved.train
    devices = jax.local_devices()
    name = config.parallel
    if name == "auto":
        name = "jit" if len(devices) == 1 else "pmap"
    steps = config.steps_per_call
    if name == "jit":
        jitted = functools.partial(jit_train_step, resolved.sae, optimizer, steps_per_call=steps)
        return Placement(
            lambda capacity: jitted(capacity=capacity),
            SingleDeviceSharding(devices[0]),
            _mesh(devices[:1], (1, 1)),
            name,
        )
    if name == "pmap":
        _require_multiple("--batch-size", config.batch_size, len(devices), "local devices")
        mapped = functools.partial(pmap_train_step, resolved.sae, optimizer, steps_per_call=steps)
        mesh, step = _mesh(devices, (len(devices), 1)), lambda capacity: mapped(capacity=capacity)
    else:
        mesh = _named_mesh(resolved)
        sharded = mesh_train_step(resolved.sae, optimizer, mesh, steps_per_call=steps)
        step = lambda capacity: sharded  # noqa: E731 (TrainConfig makes sure that the capacity is None)
    rows = P("data", None) if steps == 1 else P(None, "data", None)
    return Placement(step, NamedSharding(mesh, rows), mesh, name)


def _named_mesh(resolved: ResolvedConfig) -> Mesh:
    shape = resolved.train.mesh
    assert shape is not None  # TrainConfig makes sure of it
    devices = jax.devices()
    if min(shape) < 1 or shape[0] * shape[1] != len(devices):
        raise InputError(
            f"--mesh is {shape[0]} {shape[1]}; expected two numbers with product {len(devices)}, the devices here"
        )
    _require_multiple("--batch-size", resolved.train.batch_size, shape[0], "devices of the data axis")
    _require_multiple("--n-concepts", resolved.sae.n_concepts, shape[1], "devices of the concept axis")
    return _mesh(devices, shape)


def _mesh(devices: list[jax.Device], shape: tuple[int, int]) -> Mesh:
    return Mesh(np.asarray(devices).reshape(shape), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def _require_multiple(flag: str, value: int, of: int, what: str) -> None:
    if value % of:
        raise InputError(f"{flag} is {value}; expected a multiple of {of}, the number of {what}")
